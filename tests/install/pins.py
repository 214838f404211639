"""Reading pyproject.toml and the files of pins."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    """Version by canonical package name; every line of the file must be an exact pin or a comment."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    versions = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and not specifier.version.endswith("*"), requirement
        versions[canonicalize_name(requirement.name)] = specifier.version
    assert len(versions) == len(requirements), f"{file} pins a package twice"
    return versions


def declared(extras: tuple[str, ...] | None = None) -> dict[str, list[Requirement]]:
    """Requirements by canonical name: of the default set and of `extras` (all of them when None)."""
    optional = PROJECT["optional-dependencies"]
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in (optional if extras is None else extras) for line in optional[extra]),
    ]
    requirements: dict[str, list[Requirement]] = {}
    for line in lines:
        requirements.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return requirements
