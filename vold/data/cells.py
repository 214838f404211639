"""A row's cells by field: which column each field is read from, and which columns nobody reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MISSING = object()
SHOWN = 12  # columns that an error lists

FITTING: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(columns.split()), settings)
    for columns, settings in (
        ("prompt_ids response_ids", "layout=traces"),
        ("prompt final_answer", "layout=orz-eval"),
        ("prompt reward_model", "layout=vqa columns={question: prompt, answer: reward_model.ground_truth}"),
        ("conversations", "layout=messages"),
        ("messages", "layout=messages"),
        ("instruction output", "layout=alpaca"),
        ("prompt completion", "layout=prompt-response columns={response: completion}"),
        ("prompt response", "layout=prompt-response"),
        ("question response", "layout=prompt-response columns={question: question}"),
        ("instruction context response", "layout=alpaca columns={input: context, response: response}"),
        ("prompt chosen rejected", "layout=prompt-response columns={response: chosen}"),
        ("question options answer image_1", "layout=mmmu"),
        ("question options answer", "layout=vqa columns={choices: options}"),
        ("index question answer A B", "layout=vlmevalkit"),
        ("problem answer images", "layout=geometry3k"),
        ("question gt image", "layout=vlaa"),
        ("question answer", "layout=vqa"),
        ("problem answer", "layout=vqa columns={question: problem}"),
        ("problem solution", "layout=vqa columns={question: problem, answer: solution}"),
        ("question solution", "layout=vqa columns={answer: solution}"),
        ("prompt solution", "layout=vqa columns={question: prompt, answer: solution}"),
        ("prompt answer", "layout=vqa columns={question: prompt}"),
        ("question final_answer", "layout=vqa columns={answer: final_answer}"),
        ("problem", "layout=vqa columns={question: problem}"),
        ("chosen rejected", "layout=messages columns={messages: chosen}"),
        ("query response", "layout=prompt-response columns={prompt: query}"),
        ("query answer", "layout=vqa columns={question: query}"),
    )
)
"""Columns of a row -> the settings that read it; the first that fit are named in errors."""


class MissingColumn(ValueError):
    """A row has no column for a field that it needs."""


class Cells:
    """One row, read by field. `columns` overrides the names that a layout asks for (data.columns)."""

    def __init__(self, row: Any, columns: Mapping[str, str]):
        self.row, self.mapped = row, columns
        self.asked: set[str] = set()  # fields
        self.found: set[str] = set()  # fields that have a cell
        self.read: set[str] = set()  # columns that fields were read from, nested ones by their path

    def get(self, field: str, *names: str) -> Any:
        """The field's cell, from its own column or the first of `names` that the row has; None where it has none, or an
        empty one."""
        self.asked.add(field)
        for name in self._names(field, names):
            if (value := self._at(name)) is not MISSING and value is not None:
                self.found.add(field)
                return value
        return None

    def need(self, field: str, *names: str) -> Any:
        """As `get`. Raises MissingColumn, which lists the row's columns, where it has none of them."""
        value, names = self.get(field, *names), self._names(field, names)
        if value is None and all(self._at(name) is MISSING for name in names):
            key = f" (data.columns.{field})" if field in self.mapped else f" for the {field}"
            fitting = "" if field in self.mapped else self.fitting()
            raise MissingColumn(
                f"no column {' or '.join(map(repr, names))}{key}; {self.columns()}"
                + (f"; it fits {fitting}" if fitting else "; name the column with data.columns")
            )
        return value

    def _names(self, field: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return (self.mapped[field],) if field in self.mapped else names

    def columns(self) -> str:
        """A line that lists the row's columns."""
        if not isinstance(self.row, dict):
            return f"the row is {type(self.row).__name__}, not an object with columns"
        names = [str(name) for name in self.row]
        return f"the row has {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"

    def fitting(self) -> str:
        """The settings that would read such a row; "" where none are known."""
        if isinstance(self.row, list):
            return "data.layout=orz" if len(self.row) > 1 and isinstance(self.row[0], dict) else ""
        found = {name for name, cell in self.row.items() if cell is not None} if isinstance(self.row, dict) else set()
        settings = next((settings for columns, settings in FITTING if columns <= found), "")
        return " ".join(f"data.{part}" for part in settings.split(" ", 1)) if settings else ""

    def unread(self) -> dict[str, Any]:
        """The columns, nested ones by their path, that no field was read from, with their cells."""
        return dict(self._leaves(self.row, ""))

    def _leaves(self, cell: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, value in cell.items() if isinstance(cell, dict) else ():
            full = f"{path}{name}"
            if full in self.read or value is None:
                continue
            if any(read.startswith(f"{full}.") for read in self.read):
                yield from self._leaves(_opened(value), f"{full}.")
            else:
                yield full, value

    def _at(self, path: str) -> Any:
        """The cell of a column, or at a dotted path into nested ones (numbers count from 0 in lists)."""
        cell = self.row
        if isinstance(cell, dict) and path in cell:
            cell = cell[path]
        else:
            for part in path.split("."):
                cell = _opened(cell)
                if isinstance(cell, dict) and part in cell:
                    cell = cell[part]
                elif isinstance(cell, list) and part.isdecimal() and int(part) < len(cell):
                    cell = cell[int(part)]
                else:
                    return MISSING
        self.read.add(path)
        return cell


def _opened(cell: Any) -> Any:
    """A nested column that is kept as JSON text, read."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("{", "[")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
