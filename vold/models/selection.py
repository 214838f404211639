"""Which weights are trained: `train`, a list of patterns of transformers' names.

A pattern is a name or the name of a module, with or without the prefixes of a checkpoint, and may have wildcards:
`layers.35`, `layers.*.mlp`, `norm`, `lm_head`, `visual.merger`, `visual`, `language_model` (all but the vision tower).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import short_name
from vold.models.vision import is_merger, tower_tensors

LANGUAGE_MODEL = ("language_model", "model.language_model")
MERGERS = ("visual.merger", "visual.deepstack_merger_list")


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that takes the weight of this short name, or None."""
    return next((pattern for pattern in patterns if _takes(pattern, name)), None)


def _takes(pattern: str, name: str) -> bool:
    if pattern in LANGUAGE_MODEL:
        return not name.startswith("visual.")
    short = short_name(pattern)
    return fnmatchcase(name, short) or fnmatchcase(name, f"{short}.*")


def trained_patterns(train: Sequence[str] | None, *, train_merger: bool, has_adapter: bool) -> tuple[str, ...]:
    """The patterns of all weights that are trained themselves, beside adapters."""
    chosen = tuple(train) if train is not None else () if has_adapter else LANGUAGE_MODEL[:1]
    return (*chosen, *(MERGERS if train_merger else ()))


def takes_mergers(patterns: Sequence[str], arch: Architecture) -> bool:
    return any(first_match(patterns, name) for name in tower_tensors(arch))


def takes_tower(patterns: Sequence[str], arch: Architecture) -> bool:
    """True where a weight of the vision tower before its mergers is trained."""
    return any(first_match(patterns, name) for name in tower_tensors(arch) if not is_merger(name))


def check_patterns(key: str, patterns: Iterable[str], groups: Iterable[Sequence[str]]) -> None:
    """Raise ValueError for a pattern that takes no weight, or only some of a group that is one matrix here. groups: the
    model's short names, those of one parameter together."""
    groups, patterns = [*groups], [*patterns]
    for pattern in patterns:
        if not any(_takes(pattern, name) for group in groups for name in group):
            raise ValueError(
                f"{key}: {pattern!r} is no weight of the student; write names as its checkpoint has them "
                "(layers.0.mlp, norm, visual.merger, language_model), * for any"
            )
    for group in groups:
        taken = [name for name in group if first_match(patterns, name)]
        if taken and len(taken) < len(group):
            other = next(name for name in group if name not in taken)
            raise ValueError(f"{key} takes {taken[0]} without {other}, and they are one matrix here; take both")


def rates_by_name(groups: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Short name -> the rate of the first pattern of optimizer.lr_groups that takes it; others are left out."""
    found = ((name, first_match(groups, name)) for name in names)
    return {name: groups[pattern] for name, pattern in found if pattern is not None}
