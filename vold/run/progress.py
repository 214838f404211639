"""The progress line of a run on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_note(row: Mapping[str, float]) -> str:
    """The step's reward, KL, tokens/s, rollout tail, MFU and memory on one line, as far as it logged them."""
    formats = [
        ("reward", "reward {:.3f}"),
        ("nll", "nll {:.4f}"),
        ("kl_teacher", "kl {:.3f}"),
        ("prompts_per_second", "{:.2f} prompts/s"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("rollout_tail_seconds", "tail {:.1f} s"),
        ("mfu", "mfu {:.1%}"),
        ("peak_memory_gib", "{:.2f} GiB"),
    ]
    return " · ".join(text.format(row[key]) for key, text in formats if key in row)


def progress_line(writer: bool) -> Progress:
    """A live line on a terminal; silent off it and off rank 0."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not (writer and sys.stderr.isatty()),
    )
