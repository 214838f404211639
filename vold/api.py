"""`vold.load_config`: a YAML file as a config, for Python as for the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import ConfigDict

from vold.config import load
from vold.config.schema import (
    EvalConfig,
    ExportConfig,
    RlConfig,
    SelfplayConfig,
    SftConfig,
    Strict,
    TracesConfig,
)
from vold.config.schema.reward import function_specs

ConfigT = TypeVar("ConfigT", bound=Strict)

SCHEMA_OF_KEY: dict[str, type[Strict]] = {
    "challenger": SelfplayConfig,
    "rollout": RlConfig,
    "checkpoint": EvalConfig,
    "sampling": TracesConfig,
    "optimizer": SftConfig,
    "run": ExportConfig,
}
"""A key that each schema requires -> the schema; the first key that a config has decides."""


class _AnyKeys(Strict):
    """Accepts every key, to see which ones a file has."""

    model_config = ConfigDict(extra="allow")


@overload
def load_config(path: str | Path, *overrides: str | Path, schema: type[ConfigT], reward: Any = None) -> ConfigT: ...
@overload
def load_config(path: str | Path, *overrides: str | Path, reward: Any = None) -> Any: ...


def load_config(
    path: str | Path, *overrides: str | Path, schema: type[Strict] | None = None, reward: Any = None
) -> Strict:
    """Read a YAML file, apply the overrides in order, and return the frozen config.

    path: YAML file, see configs/.
    overrides: `"section.key=value"` (values are YAML), or the path of a YAML file whose keys are laid over `path`'s.
    schema: class of the config (see vold.config.schema); without it, chosen by the keys that the file has: RlConfig,
        SftConfig, EvalConfig, TracesConfig, SelfplayConfig or ExportConfig.
    reward: `reward.function`: a function at the top level of a file, "PATH.py:NAME", or several with their weights.
    Raises ValueError, in one line with the fix, for a file, key or value that does not fit.
    """
    path, changes = Path(path), [str(override) for override in overrides]
    if reward is not None:
        changes.append(f"reward.function={json.dumps(function_specs(reward))}")
    return load.load_config(schema or _schema_by_content(path, changes), path, changes)


def _schema_by_content(path: Path, overrides: list[str]) -> type[Strict]:
    keys = load.load_config(_AnyKeys, path, overrides).model_extra or {}
    for key, schema in SCHEMA_OF_KEY.items():
        if key in keys:
            return schema
    raise ValueError(f"{path} has none of the keys {', '.join(SCHEMA_OF_KEY)} that tell its stage; give schema=...")
