"""What a part costs, before it starts and after: CPU-hours by kind of run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from vold.miniature.science.protocol import START, Part, Training, part_folder
from vold.miniature.science.results import Result, chosen_rates, counted, read_results
from vold.miniature.science.runs import COST_FILE, start_path
from vold.report.tables import markdown

SFT_SECONDS, TEST_SECONDS = 0.2, 5.0
"""CPU seconds of an SFT step and of a set of test problems, until some were measured."""


def budget(root: Path, path: Path, part: Part) -> str:
    """A table of predicted and spent CPU-hours."""
    results = read_results(part_folder(root, path))
    starts, swept, wanted = part.trained_starts(), _swept(part), part.counted(chosen_rates([], part))
    tried = min(sum(result["swept"] for result in results), len(swept))  # a sweep may have gone on
    done = sum(result["arm"] != START for result in counted(results, part))
    costs = [
        json.loads(file.read_text()) for one in starts if (file := start_path(root, *one).with_name(COST_FILE)).exists()
    ]
    hours = predicted_hours(part, results)
    rows = [
        _row("starts", len(starts), len(costs), hours["starts"], sum(cost["cpu_seconds"] for cost in costs)),
        _row("sweep", len(swept), tried, hours["sweep"], _spent(results, True)),
        _row("counted", len(wanted), done, hours["counted"], _spent(results, False)),
    ]
    return markdown(["CPU-hours", "runs", "done", "predicted", "spent"], rows)


def predicted_hours(part: Part, results: Sequence[Result] = ()) -> dict[str, float]:
    """CPU-hours of a part's starts, sweeps (with the rates they begin with) and counted runs, by a step's seconds in
    `results`, or by those that the part states."""
    seconds = {
        "starts": sum(SFT_SECONDS * start.steps for _, start, _ in part.trained_starts()),
        "sweep": _seconds(part, results, _swept(part)),
        "counted": _seconds(part, results, part.counted(chosen_rates([], part))),
    }
    return {kind: value / 3600 for kind, value in seconds.items()}


def _swept(part: Part) -> list[Training]:
    return [training for cell in part.sweeps() for training in part.tried(cell, part.arms[cell.arm].rates)]


def _row(kind: str, runs: int, done: int, predicted: float, spent: float) -> list[str]:
    return [kind, str(runs), str(done), f"{predicted:.2f}", f"{spent / 3600:.2f}"]


def _seconds(part: Part, results: Sequence[Result], trainings: Sequence[Training]) -> float:
    """Predicted: steps by an arm's measured seconds a step, and the tests of runs that count."""
    measured: dict[str, list[float]] = {}
    for result in results:
        if (seconds := result.get("step_cpu_seconds")) and seconds == seconds:
            measured.setdefault(result["arm"], []).append(seconds)
    by_arm = {arm: statistics.median(values) for arm, values in measured.items()}
    return sum(
        part.steps_of(t.condition) * by_arm.get(t.arm, part.seconds) + (not t.swept) * len(part.sets) * TEST_SECONDS
        for t in trainings
    )


def _spent(results: Sequence[Result], swept: bool) -> float:
    return sum(result["cpu_seconds"] for result in results if result["swept"] == swept)
