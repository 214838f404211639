"""What a number is called, what it means, when to worry, and which colour a run has on every plot and table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INK, SOFT, GRID = "#24221f", "#6c675e", "#e4dfd4"  # text, axis text, rules; page.css has the dark counterparts

# Distinct for deuteranopes and protanopes by lightness as well as hue. page.css names them --run-0 … in this order.
PALETTE = ("#b0aa9e", "#c48a0c", "#1d62ab", "#b83a57", "#1a8a76", "#8660b8", "#4fa5d8", "#8a5a2b")
_RESERVED = {"base": 0, "teacher": 5, "sft": 1, "grpo": 2, "vold": 3, "unmasked": 4, "opd": 6, "traces": 7}


@dataclass(frozen=True)
class Metric:
    """`limit`: above it the page raises a flag. Limits are rules of thumb, and the page says so."""

    label: str
    unit: str = ""
    meaning: str = ""
    limit: float | None = None
    log: bool = False


METRICS: dict[str, Metric] = {
    "reward": Metric("Reward", "mean over responses", "Share of sampled responses that the grader accepts."),
    "loss": Metric("Loss", "nats per token"),
    "pg_loss": Metric("Policy loss", "nats per token"),
    "kl_loss": Metric("Distillation loss", "nats² per token"),
    "kl_teacher": Metric("Teacher KL", "½(log p − log p teacher)², nats²", "How far the student is from the teacher."),
    "entropy": Metric("Entropy", "nats per token", "How undecided the student is; near 0, nothing is left to explore."),
    "response_length": Metric("Response length", "tokens"),
    "grad_norm": Metric("Gradient norm", "before clipping", "Spikes come before collapses.", log=True),
    "lr": Metric("Learning rate", ""),
    "tokens_per_second": Metric("Throughput", "tokens per second", "All phases included."),
    "peak_memory_gib": Metric("Peak memory", "GiB", "Highest so far on one device."),
    "mismatch_mean": Metric(
        "Sampler–trainer mismatch, mean",
        "|Δ log p|, nats",
        "Sampler and trainer score the same tokens; at equal weights only rounding remains.",
        limit=0.02,
    ),
    "mismatch_max": Metric(
        "Sampler–trainer mismatch, worst token",
        "|Δ log p|, nats",
        "The same for the worst token of the batch; large means stale weights or a wrong mask.",
        limit=1.0,
    ),
    "clip_low": Metric(
        "Clipped below", "share of tokens", "Tokens whose ratio fell under the clip range: no gradient.", limit=0.1
    ),
    "clip_high": Metric(
        "Clipped above", "share of tokens", "Tokens whose ratio rose over the clip range: no gradient.", limit=0.1
    ),
    "truncated": Metric(
        "Truncated", "share of responses", "Responses that hit the length limit and cannot be graded.", limit=0.1
    ),
    "broken": Metric(
        "Broken", "share of responses", "Responses on which the grader failed; masked out, not wrong.", limit=0.01
    ),
}

CURVES: dict[str, tuple[str, ...]] = {
    "rl": ("reward", "kl_teacher", "accuracy_image", "accuracy_text", "entropy", "response_length", "grad_norm"),
    "sft": ("loss", "accuracy_image", "accuracy_text", "grad_norm"),
}
HEALTH = (
    "mismatch_mean",
    "mismatch_max",
    "clip_low",
    "clip_high",
    "truncated",
    "broken",
    "entropy",
    "grad_norm",
)
_ACRONYMS = ("sft", "grpo", "vold", "opd", "rl")
PHASES = ("rollout", "grade", "teacher", "train", "sync")
TRAIN_PARTS = ("student_forward", "student_backward", "optimizer")


def metric(key: str) -> Metric:
    """How `key` is shown; a key nobody described shows its own name."""
    if key in METRICS:
        return METRICS[key]
    if key.startswith("accuracy_"):
        return Metric(f"{key.removeprefix('accuracy_').capitalize()} accuracy", "held-out problems")
    return Metric(key.replace("_", " ").capitalize())


def arm_of(name: str) -> str:
    """The model behind a run: eval_vold and eval/vold are vold's."""
    return name.split("/")[-1].removeprefix("eval_").removeprefix("eval-")


def label(name: str) -> str:
    """How a run is written for people: VOLD for vold; anything but a known acronym stays as it is."""
    return name.upper() if name in _ACRONYMS else name


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per run. Known arms keep theirs in every report; others take what is left, in order."""
    slots: dict[str, int] = {}
    arms = list(dict.fromkeys(arm_of(name) for name in names))
    for arm in arms:  # exact names first: `vold` keeps its colour although `vold-beta1` may come before it
        if arm in _RESERVED:
            slots[arm] = _RESERVED[arm]
    for arm in arms:
        if arm not in slots:
            slots[arm] = _free_slot(arm, taken=set(slots.values()))
    return {name: PALETTE[slots[arm_of(name)]] for name in names}


def _free_slot(arm: str, *, taken: set[int]) -> int:
    for known, slot in _RESERVED.items():
        if arm.startswith(known) and slot not in taken:
            return slot
    order = (2, 3, 4, 1, 5, 6, 7, 0)
    return next((slot for slot in order if slot not in taken), order[len(taken) % len(order)])
