"""Labels, healthy ranges and colours: a metric, a phase or a run looks alike on every plot and table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

INK, SOFT, GRID = "#24221f", "#6c675e", "#e4dfd4"  # text, axis text, grid lines; page.css has the dark counterparts

# Distinct for deuteranopes and protanopes by lightness as well as hue. page.css names them --run-0 … in this order.
PALETTE = ("#b0aa9e", "#c48a0c", "#1d62ab", "#b83a57", "#1a8a76", "#8660b8", "#4fa5d8", "#8a5a2b")
_RESERVED = {"base": 0, "teacher": 5, "sft": 1, "grpo": 2, "vold": 3, "unmasked": 4, "opd": 6, "traces": 7}
_FREE_ORDER = (2, 3, 4, 1, 5, 6, 7, 0)

# Phases in the order of a step. page.css names the colours --phase-0 … in this order.
PHASES = {
    "rollout": "#33506e",
    "rollout_wait": "#c9d3dd",
    "grade": "#8fb3a5",
    "gather": "#8a5a2c",
    "teacher": "#d0a54a",
    "teacher_wait": "#ead9b4",
    "image_sensitivity": "#3f8fa3",
    "old_logprobs": "#a3a24e",
    "train": "#6f8fb8",
    "student_forward": "#9db8d9",
    "student_backward": "#4f78ad",
    "optimizer": "#8660b9",
    "sync": "#a7647a",
    "evaluate": "#4f8d76",
    "other": "#b9b3a6",
}
TRAIN_PARTS = ("old_logprobs", "student_forward", "student_backward", "optimizer")


@dataclass(frozen=True)
class Metric:
    """How a metric is shown (metrics.yaml).

    healthy_max, healthy_min   rules of thumb; beyond them the page raises a flag
    advice                     the first thing to check then
    better                     +1 where more is better, -1 where less is, 0 where neither is
    log                        whether a wide range is drawn on a logarithmic axis
    """

    label: str
    unit: str = ""
    meaning: str = ""
    healthy_max: float | None = None
    healthy_min: float | None = None
    advice: str = ""
    better: int = 0
    log: bool = False

    @property
    def has_limit(self) -> bool:
        return self.healthy_max is not None or self.healthy_min is not None

    @property
    def is_share(self) -> bool:
        return self.unit.startswith("share")

    def is_unhealthy(self, value: float) -> bool:
        """Return whether a value is beyond a limit; NaN never is."""
        above = self.healthy_max is not None and value > self.healthy_max
        return above or (self.healthy_min is not None and value < self.healthy_min)

    def format(self, value: float) -> str:
        """Three significant figures; a share as percent."""
        return f"{format_number(round(100 * value, 1))} %" if self.is_share else format_number(value)

    @property
    def limit(self) -> str:
        """The healthy range as text: ≤ 10 %, ≥ 50 %, – without one."""
        if self.healthy_max is not None:
            return f"≤ {self.format(self.healthy_max)}"
        return "–" if self.healthy_min is None else f"≥ {self.format(self.healthy_min)}"


_METRICS_FILE = files("vold.report").joinpath("metrics.yaml").read_text(encoding="utf-8")
CURVES, _FIELDS = yaml.safe_load_all(_METRICS_FILE)
METRICS = {key: Metric(**fields) for key, fields in _FIELDS.items()}
HEALTH = (*(key for key, metric in METRICS.items() if metric.has_limit), "entropy", "grad_norm")
_NAMES = {name: name.upper() for name in ("sft", "rl", "grpo", "dapo", "gspo", "dcpo", "vold", "opd", "sdpo", "srpo")}
_NAMES |= {"va-opd": "VA-OPD", "dr-grpo": "Dr.GRPO", "r-zero": "R-Zero", "r-diverse": "R-Diverse"}
_NAMES |= {"vold-unmasked": "VOLD without mask"}


def metric(key: str) -> Metric:
    """Return how `key` is shown; a key that metrics.yaml does not have shows its own name."""
    if key in METRICS:
        return METRICS[key]
    if key.startswith("accuracy_"):
        return Metric(f"{key.removeprefix('accuracy_').capitalize()} accuracy", "share of held-out problems", better=1)
    return Metric(key.replace("_", " ").capitalize())


def ordered(names: Iterable[str], first: Iterable[str]) -> list[str]:
    """Return the names with those of `first` in front, in its order."""
    names = dict.fromkeys(names)
    return [name for name in dict.fromkeys([*first, *names]) if name in names]


def arm_of(name: str) -> str:
    """Return the model behind a run name: eval_vold, eval/vold and seed0/vold are vold's."""
    return name.split("/")[-1].removeprefix("eval_").removeprefix("eval-")


def label(name: str) -> str:
    """Return a run's name as it is written for people: VOLD for vold; a name of one's own unchanged."""
    return _NAMES.get(name, name)


def short_label(name: str, most: int = 24) -> str:
    """A label that leaves enough space for a figure."""
    return label(name) if len(name) <= most else f"{name[: most // 2]}…{name[2 - most // 2 :]}"


def colours(names: Sequence[str]) -> dict[str, str]:
    """Assign one colour per run. Known arms have theirs in every report; others take a free one, in order."""
    slots: dict[str, int] = {}
    # exact names first: `vold` keeps its colour although `vold-beta1` may come before it
    for arm in ordered(map(arm_of, names), _RESERVED):
        related = [slot for known, slot in _RESERVED.items() if arm.startswith(known)]
        free = (slot for slot in (*related, *_FREE_ORDER) if slot not in slots.values())
        slots[arm] = next(free, _FREE_ORDER[0])
    return {name: PALETTE[slots[arm_of(name)]] for name in names}


def phase_colours(names: Sequence[str]) -> dict[str, str]:
    """Assign one colour per phase: a phase that is a run has the run's; an unknown phase takes one by its position."""
    runs = colours([name for name in names if label(name) != name])
    unknown = [name for name in names if name not in runs and name not in PHASES]
    spare = list(PHASES.values())
    return runs | PHASES | {name: spare[i % len(spare)] for i, name in enumerate(unknown)}


def format_number(value: float) -> str:
    """Three significant figures, without an exponent where a person would not use one."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """7.3 s, 4 min 10 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
