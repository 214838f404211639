"""The results of a part as tables of right answers, and what the pre-stated comparisons say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vold.io import write_atomically
from vold.miniature.science.protocol import START, Cell, Contrast, Part, Training, best_rate, result_path
from vold.miniature.science.statistics import Estimate, crossed, holm, over_seeds

Result = dict[str, Any]
ALPHA = 0.05
FEWEST_SEEDS = 3  # the spread of two says too little of their error


@dataclass(frozen=True)
class Finding:
    """What came out of one contrast, in points; `p` is Holm's, over the part's family."""

    contrast: Contrast
    estimate: Estimate
    seeds: int
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= ALPHA:
            return "undecided"
        return "better" if self.estimate.mean > 0 else "worse"


def read_results(folder: Path) -> list[Result]:
    """All runs of a part's folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/*-lr*.json"))]


def pack(right: Sequence[bool] | np.ndarray) -> str:
    """Right and wrong answers as their number and hexadecimal bits."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpack(text: str) -> np.ndarray:
    """The inverse of `pack`: 0 or 1 [problems]."""
    count, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=int(count)).astype(int)


def read_published(file: Path) -> list[Result]:
    """All runs of a part from the one file that `report.write_part` leaves."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def training_of(result: Result) -> Training:
    """The run that a result is of."""
    return Training(*(result[one.name] for one in fields(Training)))


def begin_with(root: Path, path: Path, results: Sequence[Result]) -> None:
    """Put runs that were made elsewhere among those of the part at `path`, where it has none of their name."""
    for result in results:
        file = result_path(root, path, training_of(result))
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(result) + "\n")


def sweep_scores(results: Sequence[Result], part: Part) -> dict[Cell, dict[float, float]]:
    """Swept cell -> rate, ascending -> mean validation accuracy over measures and the sweep's seeds, of all tried."""
    scores: dict[Cell, dict[float, float]] = {}
    for cell in part.sweeps():
        swept = {(r["seed"], r["rate"]): r for r in results if r["swept"] and _cell(r) == cell}
        for rate in sorted({rate for _, rate in swept}):
            tried = [swept.get((seed, rate)) for seed in part.sweep.seeds]
            if all(tried):
                values = [validation(result) for result in tried if result]
                scores.setdefault(cell, {})[rate] = sum(values) / len(values)
    return scores


def chosen_rates(results: Sequence[Result], part: Part) -> dict[Cell, float]:
    """Cell -> the best rate of its sweep so far, or the first that is stated."""
    best = {cell: best_rate(tried) for cell, tried in sweep_scores(results, part).items()}
    return {cell: best.get(part.swept_at(cell), part.arms[cell.arm].rates[0]) for cell in part.cells()}


def counted(results: Sequence[Result], part: Part) -> list[Result]:
    """The runs that count: of the part's seeds, tested, and at the rate that their cell's sweep ended with."""
    rates = chosen_rates(results, part) | {Cell(condition, START): 0.0 for condition in part.conditions}
    return [r for r in results if not r["swept"] and r["seed"] in part.seeds and r["rate"] == rates.get(_cell(r))]


def _cell(result: Result) -> Cell:
    return Cell(result["condition"], result["arm"])


def validation(result: Result) -> float:
    """Mean validation accuracy over the measures at the end of a run; nan where it failed."""
    if "failed" in result:
        return math.nan
    return float(np.mean([points[-1][1] for points in result["validation"].values()]))


def answers(results: Sequence[Result], condition: str, arm: str, measure: str) -> dict[int, np.ndarray]:
    """Seed -> right answers, 0 or 1 [problems], of the runs that count; one that diverged has none right."""
    runs = [r for r in results if _cell(r) == (condition, arm)]
    tested = {r["seed"]: unpack(r["correct"][measure]) for r in runs if measure in r.get("correct", {})}
    count = next((len(unpack(r["correct"][measure])) for r in results if measure in r.get("correct", {})), 0)
    diverged = [r["seed"] for r in runs if "failed" in r] if count else []
    return dict.fromkeys(diverged, np.zeros(count, int)) | tested


def accuracy(results: Sequence[Result], condition: str, arm: str, measure: str) -> Estimate | None:
    """In percent, with the error over seeds and problems; None with fewer than two seeds."""
    table = answers(results, condition, arm, measure)
    return crossed(100.0 * np.stack([*table.values()])) if len(table) > 1 else None


def difference(results: Sequence[Result], contrast: Contrast) -> tuple[Estimate, int] | None:
    """In points over the seeds that both arms have, paired by seed and problem; and the number of seeds."""
    new = answers(results, contrast.condition, contrast.new, contrast.measure)
    old = answers(results, contrast.against, contrast.old, contrast.measure)
    seeds = sorted(new.keys() & old.keys())
    if len(seeds) < FEWEST_SEEDS:
        return None
    return crossed(100.0 * np.stack([new[seed] - old[seed] for seed in seeds])), len(seeds)


def findings(results: Sequence[Result], part: Part) -> list[Finding]:
    """All pre-stated contrasts that have seeds enough, adjusted by Holm over all that were stated: one that is not
    measured counts as one whose p is 1, so that no verdict changes by leaving some out."""
    measured = [(c, *values) for c in part.family if (values := difference(results, c))]
    absent = len(part.family) - len(measured)
    adjusted = holm([estimate.p for _, estimate, _ in measured] + [1.0] * absent)
    return [Finding(c, estimate, n, p) for (c, estimate, n), p in zip(measured, adjusted, strict=False)]


def logged(results: Sequence[Result], condition: str, arm: str, key: str) -> Estimate | None:
    """A logged metric of the counted runs, with the interval over seeds."""
    values = [
        result["logged"][key]
        for result in results
        if (result["condition"], result["arm"]) == (condition, arm) and key in result.get("logged", {})
    ]
    return over_seeds(values) if values else None
