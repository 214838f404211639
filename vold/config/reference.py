"""Writes the reference of all config keys as Markdown, for docs/config.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vold.config.schema import EvalConfig, ExportConfig, RlConfig, SelfplayConfig, SftConfig, TracesConfig

COMMANDS = (TracesConfig, SftConfig, RlConfig, EvalConfig, ExportConfig, SelfplayConfig)
HEAD = """# Config keys

Every key that a YAML file or an override may hold, with type, default and unit. Written by `vold.config.reference` from
`vold/config/schema/`; tests/config/test_reference.py fails where the two differ (`WRITE=1` rewrites this page).

A key without a default is required. On the command line a key is dotted: `optimizer.lr=1e-6`.
"""
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_NAMES: dict[object, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true, false",
    Path: "path",
    Any: "value",
}


def markdown() -> str:
    """The page: one table for each command's config, then one for each section in it."""
    sections: dict[type[BaseModel], None] = {}
    for command in COMMANDS:
        sections |= dict.fromkeys(_sections(command))
    tables = [_table(schema) for schema in (*COMMANDS, *sections)]
    return "\n".join([HEAD, *tables])


def _sections(schema: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for info in schema.model_fields.values():
        for section in _models(info.annotation):
            yield section
            yield from _sections(section)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _table(schema: type[BaseModel]) -> str:
    rows = [f"## {schema.__name__}\n\n{_text(schema.__doc__)}\n\n| key | type | default | meaning |\n|:--|:--|:--|:--|"]
    rows += [
        f"| `{name}` | {_cell(type_text(info))} | {default_text(info)} | {_cell(description(info))} |"
        for name, info in schema.model_fields.items()
    ]
    return "\n".join(rows) + "\n"


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def description(info: FieldInfo) -> str:
    """What a key means, on one line."""
    return _text(info.description)


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The schema of a key that holds one section, optional or not."""
    models = list(_models(info.annotation))
    return models[0] if models and get_origin(info.annotation) not in (dict, tuple) else None


def type_text(info: FieldInfo) -> str:
    """A key's type in words, e.g. `integer > 0 or null`."""
    return _type(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)


def _type(annotation: Any) -> str:
    """An annotation in words, e.g. `integer > 0 or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_type(arguments[0]), *_constraints(arguments[1:])])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join("null" if argument is NoneType else _type(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}" if arguments[-1] is ... else f"{len(arguments)} {_type(arguments[0])}s"
    if origin is dict:
        return f"name: {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _NAMES[annotation]


def _constraints(metadata: tuple[Any, ...]) -> Iterator[str]:
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            yield from _constraints(tuple(constraint.metadata))
        for name, sign in _BOUNDS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                yield f"{sign} {bound:g}"


def default_text(info: FieldInfo) -> str:
    """A key's default as code; "" for a key that is required."""
    if info.is_required():
        return ""
    value = info.default
    if isinstance(value, BaseModel):
        return "defaults below"
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value, ensure_ascii=False)}`"
