"""Problems and text traces from the rows of a data set; all rows are validated before a model is loaded.

`data.path` chooses the reader of its rows (rows.py), `data.layout` and `data.columns` the columns of their fields
(layouts.py). A new data set is one function in a table there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vold.config.schema import DataConfig
from vold.data.cells import Cells, MissingColumn
from vold.data.conversations import IMAGE, Conversation, Turn
from vold.data.golds import answers_in, read_gold
from vold.data.layouts import PROBLEM_LAYOUTS, TRACE_LAYOUTS, Fields, check_unread
from vold.data.marks import picture_paths, place_images, problem_turns, trace_turns
from vold.data.options import as_tuple, named_letter, read_options
from vold.data.rows import Row, read_rows
from vold.io import log, one_line, one_line_errors

THREADS = 8
GOLD_OPTIONAL = ("messages", "alpaca")  # layouts of prompts and traces: their problems may lack an answer


@dataclass(frozen=True)
class Problem:
    """A question before any template; `<image>` marks each image's position.

    gold, other_golds   the right answer, and further right ones; "" where the data set has none
    choices             the texts of options A, B, …, where gold is a letter; "" for a letter without an option
    category            the data set's name for the kind of problem
    history             (role, text) of the turns before the question, a system turn included
    metadata            the row's columns that no field was read from, where they were asked for
    """

    id: str
    question: str
    gold: str = ""
    images: tuple[Path, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""
    history: tuple[tuple[str, str], ...] = ()
    other_golds: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TextTrace:
    """A question with a response as text (public SFT sets; `vold traces` keeps token ids instead)."""

    problem: Problem
    response: str


@dataclass(frozen=True)
class _Parser:
    """How rows become problems. needs_gold: None where the layout decides."""

    config: DataConfig
    needs_gold: bool | None = None
    keep_metadata: bool = False

    def problems(self, row: Row, fields: Fields, cells: Cells, notes: list[str]) -> list[Problem]:
        turns, pictures = problem_turns(fields)
        options = read_options(fields.choices) if fields.choices is not None else {}
        placed = place_images(turns, options, pictures, notes)
        question, golds = placed.turns[-1].text, self._golds(fields, options, cells, notes)
        if placed.options:
            question += "\nOptions:\n" + "".join(f"{letter}. {text}\n" for letter, text in placed.options.items())
            question += "Answer with the letter of the right option."
        problem = Problem(
            self._id(row),
            question,
            golds[0] if golds else "",
            picture_paths(placed.pictures, self.config, row.folder),
            as_tuple(placed.options),
            str(fields.category or ""),
            _history(placed.turns[:-1]),
            tuple(golds[1:]),
            cells.unread() if self.keep_metadata else {},
        )
        return [problem]

    def traces(self, row: Row, fields: Fields, cells: Cells, notes: list[str]) -> list[TextTrace]:
        """One trace, or one of each assistant turn (data.targets: all)."""
        if fields.messages is None and fields.response is None:
            cells.need("response", "output")
        turns, pictures = trace_turns(fields)
        placed = place_images(turns, {}, pictures, notes)
        images = picture_paths(placed.pictures, self.config, row.folder)
        targets = Conversation(placed.turns).targets(self.config.targets)
        traces = []
        for number, (before, response) in enumerate(targets, start=1):
            if before[-1].role != "user":
                raise ValueError("two assistant turns follow one another: which answers the user?")
            marks = sum(turn.text.count(IMAGE) for turn in before) if images else 0
            id = self._id(row) if len(targets) == 1 else f"{self._id(row)}/{number}"
            problem = Problem(id, before[-1].text, images=images[:marks], history=_history(before[:-1]))
            traces.append(TextTrace(problem, response))
        return traces

    def _id(self, row: Row) -> str:
        return f"{self.config.path.stem}:{row.number}"

    def _golds(self, fields: Fields, options: dict[str, str], cells: Cells, notes: list[str]) -> list[str]:
        """The right answers. Raises ValueError where one is needed and there is none to grade by."""
        needed = self.needs_gold
        if needed is None:
            needed = self.config.layout not in GOLD_OPTIONAL
        answers = answers_in(fields.answer)
        answers = [answer for answer in answers if answer is not None]
        if not answers:
            if needed:
                line = "no answer to grade by; name its column with data.columns={answer: …}"
                raise ValueError(f"{line}; {cells.columns()}")
            return []
        try:
            if options:
                found = [named_letter(answer, options) for answer in answers]
            else:
                found = [read_gold(answer, self.config, fields.answer_form) for answer in answers]
        except ValueError:
            if needed:
                raise
            notes.append("with an answer that no response could match: kept without it")
            return []
        return list(dict.fromkeys(found))


def _history(turns: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.text) for turn in turns)


@one_line_errors()
def load_problems(
    config: DataConfig,
    report: Callable[[str], None] = log.info,
    *,
    needs_gold: bool | None = None,
    keep_metadata: bool = False,
) -> list[Problem]:
    """All problems of a set, in order.

    needs_gold: whether a row must have an answer that a response could match; None: unless the layout is of prompts.
    keep_metadata: keep the columns that are not read, for a reward function.
    Raises ValueError that names file and row for a bad row; with on_error: skip the row is left out and `report` gets
    that line. It also gets a line for everything that rows lost.
    """
    if config.layout not in PROBLEM_LAYOUTS:
        raise ValueError(f"data.layout = {config.layout!r} holds no problems; one of {', '.join(PROBLEM_LAYOUTS)}")
    parser = _Parser(config, needs_gold, keep_metadata)
    problems = list(_parse_rows(config, PROBLEM_LAYOUTS[config.layout], parser.problems, report))
    if not problems:
        raise ValueError(f"{config.path} holds no usable problem")
    return problems


def iterate_text_traces(config: DataConfig, report: Callable[[str], None] = log.info) -> Iterator[TextTrace]:
    """The (question, response) rows of a text SFT set one at a time; `report` and errors as in load_problems."""
    with one_line_errors():
        if config.layout not in TRACE_LAYOUTS:
            names = ", ".join(("traces", *TRACE_LAYOUTS))
            raise ValueError(f"data.layout = {config.layout!r} holds no traces; one of {names}")
        empty = True
        for trace in _parse_rows(config, TRACE_LAYOUTS[config.layout], _Parser(config).traces, report):
            empty = False
            yield trace
        if empty:
            raise ValueError(f"{config.path} holds no usable trace")


def load_text_traces(config: DataConfig, report: Callable[[str], None] = log.info) -> list[TextTrace]:
    """All of `iterate_text_traces`."""
    return list(iterate_text_traces(config, report))


@dataclass
class ColumnUse:
    """The columns of a set's rows: those that a field was read from (nested ones by their path), and the others."""

    read: list[str]
    unread: list[str]


@one_line_errors()
def column_use(config: DataConfig, rows: int = 200) -> ColumnUse:
    """Which columns of the first rows are read. Rows that do not fit are left to the loaders."""
    layout = {**PROBLEM_LAYOUTS, **TRACE_LAYOUTS}.get(config.layout)
    read: dict[str, None] = {}
    unread: dict[str, None] = {}
    for row in islice(read_rows(config), rows) if layout else ():
        cells = Cells(row.cells, config.columns)
        try:
            layout(cells)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
        read |= dict.fromkeys(sorted(cells.read))
        unread |= dict.fromkeys(cells.unread())
    return ColumnUse(list(read), [name for name in unread if name not in read])


def _parse_rows(config: DataConfig, layout: Callable, parse: Callable, report: Callable[[str], None]) -> Iterator:
    """Problems or traces in order, parsed by several threads: decoding pictures is slow."""
    counts: Counter[str] = Counter()  # of rows that lost something, by what
    first: dict[str, str] = {}
    asked: set[str] = set()
    found: set[str] = set()

    def attempt(row: Row) -> tuple[Row, Cells, list, list[str]] | ValueError:
        if isinstance(row.cells, ValueError):  # a line that could not be read
            return row.cells
        cells, notes = Cells(row.cells, config.columns), []
        try:
            fields = layout(cells)
            check_unread(cells, fields, notes)
            return row, cells, parse(row, fields, cells, notes), notes
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return ValueError(f"{row.where}: {_reason(error, config.layout)}")

    rows = islice(read_rows(config), config.limit)
    with ThreadPoolExecutor(THREADS) as pool:
        while window := list(islice(rows, 16 * THREADS)):
            for result in pool.map(attempt, window):
                if isinstance(result, ValueError):
                    if config.on_error == "stop":
                        raise ValueError(f"{result} (data.on_error=skip leaves such rows out)")
                    report(one_line(f"skipped {result}"))
                    continue
                row, cells, parsed, notes = result
                asked |= cells.asked
                found |= cells.found
                for note in notes:
                    counts[note] += 1
                    first.setdefault(note, row.where)
                yield from parsed
    for note, count in counts.items():
        report(one_line(f"{count} rows {note} (the first: {first[note]})"))
    _check_mapping(config, asked, found)


def _check_mapping(config: DataConfig, asked: set[str], found: set[str]) -> None:
    """Raise ValueError for a field of data.columns that the layout does not read, or whose column is in no row."""
    for name, column in config.columns.items():
        if asked and name not in asked:
            raise ValueError(
                f"data.columns.{name}: layout {config.layout!r} has no such field; it reads {', '.join(sorted(asked))}"
            )
        if asked and name not in found:
            raise ValueError(f"data.columns.{name} = {column!r} is in no row of {config.path}; correct the name")


def _reason(error: Exception, layout: str) -> str:
    if isinstance(error, MissingColumn):
        return f"not a row of layout {layout!r}: {error}"
    if type(error) is ValueError:
        return str(error)
    reason = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
    return f"not a row of layout {layout!r} ({reason})"
