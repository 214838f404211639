"""What a run says while it runs: a live line on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
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


def step_line(verb: str, step: int, total: int, row: Mapping[str, float], seconds_left: float) -> str:
    """`rl 3/60 · reward 0.412 · kl 0.230 · 1200 tok/s · 2.1 s · 2:05 left`. Step 0, which trains nothing, tells no time
    left."""
    left = time.strftime("%H:%M:%S" if seconds_left >= 3600 else "%M:%S", time.gmtime(seconds_left))
    if seconds_left >= 86400:
        left = f"{seconds_left / 86400:.1f} days"
    parts = [f"{verb} {step}/{total}", progress_note(row), f"{row['seconds']:.1f} s", f"{left} left" if step else ""]
    return " · ".join(filter(None, parts))


def accuracy_line(row: Mapping[str, float]) -> str:
    """`text 46.0 ± 2.5 %, image 44.0 ± 2.5 %` of a step that evaluated; "" of another."""
    scores = []
    for name in (key.removeprefix("accuracy_") for key in row if key.startswith("accuracy_")):
        error = f" ± {100 * row[f'stderr_{name}']:.1f}" if f"stderr_{name}" in row else ""
        scores.append(f"{name} {100 * row[f'accuracy_{name}']:.1f}{error} %")
    return ", ".join(scores)


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
