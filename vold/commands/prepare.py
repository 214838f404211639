"""`vold prepare-student`: the pair check's fix, a student that has the teacher's extra tokens at the same ids."""

from __future__ import annotations

from pathlib import Path

from vold.models.tokenizer import add_thinking_tokens


def run(student: Path, teacher: Path, out: Path) -> None:
    """Writes `out`: the student with the missing tokens added, their rows the mean of their old pieces."""
    add_thinking_tokens(student, teacher, out)
    print(f"{out}: {student} with the tokens of {teacher}")
