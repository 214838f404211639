"""Tokenizers of a student and its teacher, which must give every token the same id.

Distillation scores the student's own ids with the teacher, so an id must mean the same to both. Qwen3 has four tokens
more than Qwen2.5 (`<think>`, `</think>`, `<tool_response>`, `</tool_response>`); a student without them spells
`<think>` in pieces that the teacher has never produced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint, reading
from vold.models.weights import CheckpointReader


@dataclass(frozen=True)
class PairReport:
    """The vocabulary of a student and a teacher that fit. Ids below `shared_vocab_size` are tokens of both; head rows
    from there on are padding, whose logits are -inf."""

    shared_vocab_size: int
    student_head_rows: int
    teacher_head_rows: int


def load_tokenizer(checkpoint_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint directory; never runs code that comes with it."""
    path = Path(checkpoint_dir)
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json: give the directory of a Hugging Face checkpoint")
    with reading(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def check_pair(student_dir: str | Path, teacher_dir: str | Path) -> PairReport:
    """Compare two checkpoints' vocabularies. Raises ValueError when they differ or do not fit the two heads."""
    student, teacher = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    size = check_vocabularies(student.get_vocab(), teacher.get_vocab(), str(student_dir), str(teacher_dir))
    rows = [Architecture.from_pretrained(path).vocab for path in (student_dir, teacher_dir)]
    if size > min(rows):
        raise ValueError(
            f"{size} token ids do not fit the heads: {rows[0]} rows in {student_dir}, {rows[1]} in {teacher_dir}: "
            "a checkpoint's tokenizer belongs to another model"
        )
    return PairReport(size, *rows)


def check_vocabularies(
    student: dict[str, int], teacher: dict[str, int], student_name: str = "student", teacher_name: str = "teacher"
) -> int:
    """The size of two equal string → id maps. Raises ValueError naming the difference when they are not equal."""
    differing = sorted((i, s) for s, i in student.items() if teacher.get(s, i) != i)
    if differing:
        i, s = differing[0]
        raise ValueError(
            f"{s!r} is id {i} in {student_name} but {teacher[s]} in {teacher_name} ({len(differing)} such tokens): "
            "choose a teacher of the student's tokenizer family"
        )
    student_only = sorted((i, s) for s, i in student.items() if s not in teacher)
    if student_only:
        raise ValueError(
            f"{teacher_name} lacks {_listed(student_only)} of {student_name}: "
            "choose a teacher of the student's tokenizer family"
        )
    missing = missing_tokens(student, teacher)
    if missing:
        raise ValueError(
            f"{student_name} lacks {_listed(missing)} of {teacher_name}: add them at the same ids with "
            f"`vold prepare-student {student_name} {teacher_name} OUT_DIR`"
        )
    return _contiguous_size(student, student_name)


def missing_tokens(student: dict[str, int], teacher: dict[str, int]) -> list[tuple[int, str]]:
    """(id, string) of the teacher's tokens the student does not have, by id."""
    return sorted((i, s) for s, i in teacher.items() if s not in student)


def _contiguous_size(vocabulary: dict[str, int], name: str) -> int:
    size = len(vocabulary)
    holes = set(range(size)) - set(vocabulary.values())
    if holes:
        raise ValueError(f"{name}: id {min(holes)} below {max(vocabulary.values())} has no token: fix the tokenizer")
    return size


def _listed(tokens: list[tuple[int, str]], at_most: int = 8) -> str:
    first = ", ".join(f"{s!r} (id {i})" for i, s in tokens[:at_most])
    return first if len(tokens) <= at_most else f"{first} and {len(tokens) - at_most} more tokens"


def extend_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Add the teacher's extra tokens to `student` in place, at the same ids.

    Returns {new id: ids that spelled the token before}. Raises ValueError when a token would get another id.
    """
    missing = missing_tokens(student.get_vocab(), teacher.get_vocab())
    pieces = {i: student.encode(s, add_special_tokens=False) for i, s in missing}
    added = teacher.added_tokens_decoder
    for i, s in missing:
        student.add_tokens([added.get(i, s)])
        if student.convert_tokens_to_ids(s) != i:
            raise ValueError(
                f"{s!r} would get id {student.convert_tokens_to_ids(s)} in the student but is {i} in the teacher: "
                "choose a teacher of the student's tokenizer family"
            )
    return pieces


def add_thinking_tokens(student_dir: str | Path, teacher_dir: str | Path, out_dir: str | Path) -> Path:
    """Write a copy of the student to `out_dir` that has the teacher's extra tokens at the teacher's ids.

    Each new row of embedding and head is the mean of the rows of the ids that spelled the token before.
    """
    student, teacher = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    pieces = extend_tokenizer(student, teacher)
    rows = Architecture.from_pretrained(student_dir).vocab
    if pieces and max(pieces) >= rows:
        raise ValueError(f"id {max(pieces)} does not fit the {rows} head rows of {student_dir}: enlarge its head first")
    tensors = []
    with CheckpointReader(student_dir) as reader:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            if name in reader:
                tensors.append((name, _with_mean_rows(reader.slice(name)[:], pieces)))
    return export_checkpoint(student_dir, out_dir, tensors, amend=student.save_pretrained)


def _with_mean_rows(weight_VD: Tensor, pieces: dict[int, list[int]]) -> Tensor:
    changed_VD = weight_VD.clone()
    for new_id, ids in pieces.items():
        changed_VD[new_id] = weight_VD[ids].float().mean(0).to(weight_VD.dtype)
    return changed_VD
