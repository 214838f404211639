"""Agreement of the grader with verdict tables: this repository's, and other graders' tests where they are at hand.

A published test file is read, never imported: three-tuples (gold, answer, verdict) of pytest's parametrize lists, as in
math-verify's tests (its sdist has them), and pairs of is_equiv(answer, gold) assertions, as in MATH's own
math_equivalence_test.py (hendrycks/math). Tests that change a comparer's settings are left out.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vold.grading import Grader, Item, extract_answer

OURS = Path(__file__).parents[1] / "tests/grading/cases"
JUDGEMENT = {
    "identical": "the same spelling",
    "words": "words are compared letter by letter",
    "units": "units are compared and never converted, and only listed ones may be left out",
    "percent": "a percentage is its exact value",
    "number": "numbers are compared exactly; only a decimal of six digits may round a fraction",
    "structure": "names, brackets and signs of relation are compared before values",
    "chain": "an answer commits to one value",
    "choice": "one option, and nothing beside it",
    "choices": "the same options",
    "ratio": "a ratio is compared as written",
    "base": "digits and base are compared as written",
    "marks": "a mark or word stands on one side only",
    "side_by_side": "two numbers side by side are not one",
    "mixed": "not a mixed number",
    "algebra": "by algebra",
    "unparsed": "not read as mathematics: known words, commands and signs only",
    "no_answer": "no single boxed answer",
    "gold": "the gold itself cannot be used",
}


@dataclass(frozen=True)
class Row:
    """A published verdict."""

    table: str
    gold: str
    response: str
    correct: bool
    choices: tuple[str, ...] = ()
    prompt: str = ""


def read_tables(paths: Sequence[Path]) -> list[Row]:
    """The rows of this repository's table, of the installed math-verify's tests if it has any, and of test files or
    folders of them."""
    rows = [row for path in sorted(OURS.glob("*.jsonl")) for row in _ours(path)]
    installed = [file for file in importlib.metadata.files("math-verify") or () if file.name.startswith("test_")]
    files = [Path(str(file.locate())) for file in installed]
    for path in paths:
        files += sorted(path.rglob("*test*.py")) if path.is_dir() else [path]
    return rows + [row for file in files for row in published(file)]


def _ours(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if case["verdict"] != "broken" and case["rule"] != "timeout":
            choices, prompt = tuple(case.get("choices", ())), case.get("prompt", "")
            yield Row("ours", case["gold"], case["response"], case["verdict"] == "correct", choices, prompt)


def published(path: Path) -> Iterator[Row]:
    """The rows of one test file of another grader."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield from _parametrized(node, path.stem)
            yield from _assertions(node, path.stem)


def _parametrized(function: ast.FunctionDef, table: str) -> Iterator[Row]:
    for decorator in function.decorator_list:
        if not isinstance(decorator, ast.Call) or len(decorator.args) != 2:
            continue
        try:
            names, cases = map(ast.literal_eval, decorator.args)
        except ValueError:
            continue
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        if names[:3] != ["gold", "pred", "expected"]:
            continue
        for case in cases:
            if len(case) == 3 and isinstance(case[0], str) and isinstance(case[1], str):
                yield Row(table, _gold(case[0]), _boxed(case[1]), bool(case[2]))


def _assertions(function: ast.FunctionDef, table: str) -> Iterator[Row]:
    texts: dict[str, str] = {}
    for statement in function.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            texts |= {name.id: str(statement.value.value) for name in statement.targets if isinstance(name, ast.Name)}
        call = statement.value if isinstance(statement, ast.Expr) else None
        asserted = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if asserted in ("self.assertTrue", "self.assertFalse") and {"test_in", "test_out"} <= texts.keys():
            yield Row(table, texts["test_out"], _boxed(texts["test_in"]), asserted == "self.assertTrue")


def _boxed(text: str) -> str:
    """A response without a box commits to its last formula, or to the whole."""
    return text if "\\boxed" in text else rf"\boxed{{{_last_formula(text)}}}"


def _last_formula(text: str) -> str:
    formulas = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)
    return next(filter(None, formulas[-1])).strip() if formulas else text


def _gold(text: str) -> str:
    return extract_answer(text) or _last_formula(text)


def agreement(rows: Iterable[Row]) -> list[str]:
    """Lines: a count for each table, and each disagreement with our judgement."""
    rows = list(rows)
    with Grader(workers=2) as grader:
        verdicts = grader.grade([Item(row.response, row.gold, False, row.choices, row.prompt) for row in rows])
    counts: dict[str, list[int]] = {}
    disagreements = []
    for row, verdict in zip(rows, verdicts, strict=True):
        agrees = (verdict.outcome == "correct") == row.correct
        count = counts.setdefault(row.table, [0, 0, 0, 0])
        for index, is_one in enumerate((True, agrees, not agrees and not row.correct, not agrees and row.correct)):
            count[index] += is_one
        if not agrees:
            said = "we accept" if verdict.outcome == "correct" else "we refuse"
            why = JUDGEMENT.get(verdict.rule, verdict.rule)
            disagreements.append(
                f"{row.table}: gold {row.gold!r}, response {row.response!r}: {said}, {verdict.rule}: {why}"
            )
    lines = ["| table | rows | agree | only we accept | only we refuse |", "|:--|--:|--:|--:|--:|"]
    lines += [f"| {table} | " + " | ".join(map(str, count)) + " |" for table, count in counts.items()]
    return [*lines, "", *disagreements]
