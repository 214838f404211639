"""`vold prepare-student`: give a student the teacher's extra tokens, which the tokenizer check requires."""

from __future__ import annotations

from pathlib import Path

from vold.io import log
from vold.models.tokenizer import add_thinking_tokens


def prepare_student(student: Path, teacher: Path, out: Path) -> None:
    """Write checkpoint directory `out`: the student with its missing tokens at the teacher's ids.

    Embedding and head rows of a new token are the mean of the rows of the tokens that its text had before.
    """
    add_thinking_tokens(student, teacher, out)
    log.info(f"{out}: {student} with the tokens of {teacher}")
