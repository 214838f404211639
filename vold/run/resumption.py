"""Which run a directory holds, and what of its config a resumed run may change."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from vold.config import dump_config
from vold.config.load import in_present_terms
from vold.config.schema import RunConfig
from vold.io import one_line_errors
from vold.untrusted import read_yaml

# any of these shows that a run got past its start
RESULTS = ("metrics.jsonl", "checkpoints", "evaluation.json", "traces", "iteration-0001")
# keys that may differ between a run and its resumption
FREE_KEYS = (
    "run_dir",  # moved or mounted elsewhere
    "parallel",
    "timeout_seconds",
    "stop_grace_seconds",
    "save_every",
    "save_async",
    "keep_checkpoints",
    "samples_per_step",
    "image_sensitivity_every",
    "evaluation.best",
    "grader_workers",
    "rollout.vllm",
    "vllm",
    "teacher_vllm",
    "teacher_openai",
    "loggers",
    "tracking",
    "reward.memory_gib",
    "reward.judge.url",
    "reward.judge.concurrency",
    "reward.judge.seconds",
    "reward.judge.retries",
    "reward.judge.budget",
    "reward.judge.cache",
    "reward.judge.api_key_env",
)
# keys that may differ too, and what that does, which is said: the result is as good and not the same to the bit
RESTATED_KEYS = {
    "steps": "a schedule of the learning rate or of beta now ends there",
    "microbatch_tokens": "sums are rounded in another order",
    "teacher_offload": "",
    "vision.patches_per_pass": "sums are rounded in another order",
    "rollout.sequences_per_call": "the sampler draws other responses of the same distribution",
    "evaluation.every": "",
    "evaluation.sets": "accuracies before and after may be of other problems",
    "evaluation.sampling": "accuracies before and after are sampled differently",
}


@one_line_errors()
def check_run_dir(config: RunConfig, verb: str, resume: bool) -> None:
    """Refuse to mix runs. Raises ValueError when the directory holds another run, or none to resume."""
    saved = config.run_dir / "config.yaml"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ValueError(f"run_dir {config.run_dir} is a file; choose another")
    if os.path.lexists(saved) and not saved.is_file():
        raise ValueError(f"{saved} is no ordinary file; write the run's own config back, or start another run_dir")
    results = [name for name in RESULTS if (config.run_dir / name).exists()]
    if not saved.is_file():
        if any(name in results for name in ("metrics.jsonl", "evaluation.json")):  # others may be of other stages
            raise ValueError(f"{saved} is missing beside {results[0]}; write it back, or start another run_dir")
        if resume:
            raise ValueError(f"--resume: {config.run_dir} holds no run; leave --resume out to start one")
        return
    if not resume and not results:
        return  # an attempt that stopped before its first step
    if not resume:
        raise ValueError(f"run_dir {config.run_dir} holds a run already; --resume continues it, or choose another")
    for key, before, now in _changes(config, verb):
        if _meaning(key) is None:
            raise ValueError(
                f"--resume: {key} was {before!r} and is now {now!r}; resume with the run's own {saved}, or start "
                "another run_dir"
            )


def restated(config: RunConfig, verb: str) -> list[str]:
    """A line for each key of RESTATED_KEYS that differs from the run that run_dir holds; [] where it holds none."""
    if not (config.run_dir / "config.yaml").is_file():
        return []
    lines = []
    for key, before, now in _changes(config, verb):
        meaning = _meaning(key)
        lines.append(f"{key} was {before!r} and is now {now!r}" + (f": {meaning}" if meaning else ""))
    return lines


def _meaning(key: str) -> str | None:
    """What a change of this key does; None for a key, or section, that is not in RESTATED_KEYS."""
    return next((text for name, text in RESTATED_KEYS.items() if key == name or key.startswith(f"{name}.")), None)


def _changes(config: RunConfig, verb: str) -> list[tuple[str, object, object]]:
    """(key, before, now) of the keys in which `config` differs from the run that run_dir holds, FREE_KEYS left out."""
    tree = read_config(config.run_dir / "config.yaml")
    before = _bound_keys(in_present_terms(tree, type(config)))
    now = _bound_keys(yaml.safe_load(dump_config(config, verb)))
    moved = _Move(str(tree.get("run_dir")), str(config.run_dir))
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if now.get(key) not in (before.get(key), moved.apply(before.get(key)))
    ]


class _Move:
    """A run directory, or a folder above it, that was moved: paths below the old place are now below the new one."""

    def __init__(self, before: str, now: str):
        old, new = list(Path(before).parts), list(Path(now).parts)
        while old and new and old[-1] == new[-1]:
            old.pop(), new.pop()
        self._old, self._new = tuple(old), tuple(new)

    def apply(self, value: object) -> object:
        """A path, or a list of values, at its new place; other values as they are."""
        if isinstance(value, list):
            return [self.apply(item) if isinstance(item, str) else item for item in value]
        if not isinstance(value, str) or (parts := Path(value).parts)[: len(self._old)] != self._old:
            return value
        return str(Path(*self._new, *parts[len(self._old) :]))


def _bound_keys(tree: dict, section: str = "") -> dict:
    """section.key -> value of every key that a resumed run must keep."""
    bound = {}
    for name, value in tree.items():
        if (key := f"{section}{name}") in FREE_KEYS:
            continue
        bound |= _bound_keys(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return bound


@one_line_errors()
def read_config(saved: Path) -> dict:
    """A run directory's config.yaml, unvalidated. Raises ValueError for a file that holds no config."""
    try:
        tree = read_yaml(saved)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise ValueError(f"{saved} is damaged; write the run's own config back, or start another run_dir")
    return tree
