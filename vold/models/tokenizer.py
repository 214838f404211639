"""Tokenizers of a student and its teacher, which must give every token the same id.

Distillation scores the student's own ids with the teacher, so an id must mean the same to both. Qwen3 has four tokens
more than Qwen2.5 (`<think>`, `</think>`, `<tool_response>`, `</tool_response>`); a student without them spells
`<think>` in pieces that the teacher has never produced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vold.data.responses import turn_end
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint, lacks, reading
from vold.models.checkpoint_reader import CheckpointReader, check_names
from vold.models.served import ServedModel


@dataclass(frozen=True)
class PairReport:
    """The vocabulary of a student and a teacher that fit. Ids of tokens are below `shared_vocab_size` in both; head
    rows from there on are padding, whose logits are -inf."""

    shared_vocab_size: int
    student_head_rows: int
    teacher_head_rows: int


def load_tokenizer(checkpoint_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint directory; never runs code that comes with it."""
    path = Path(checkpoint_dir)
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
        raise lacks(path, "tokenizer.json")
    with reading(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def id_bound(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1. Ids may have holes, so that this is more than the number of tokens, `len(tokenizer)`."""
    return max(tokenizer.get_vocab().values()) + 1


def check_checkpoint(checkpoint_dir: str | Path) -> int:
    """The bound of a checkpoint's token ids. Raises ValueError where they do not fit its head, where it stores another
    head than its config.json says, or where its end tokens are not its tokenizer's."""
    tokenizer, rows = load_tokenizer(checkpoint_dir), Architecture.from_pretrained(checkpoint_dir).vocab
    bound = id_bound(tokenizer)
    if bound > rows:
        raise ValueError(
            f"{bound} token ids do not fit the {rows} head rows of {checkpoint_dir}: enlarge its head first"
        )
    check_names(checkpoint_dir)
    stop_ids(checkpoint_dir, tokenizer)
    return bound


def stop_ids(checkpoint_dir: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: those of generation_config.json, config.json and the tokenizer together, in this
    order, each of which may be one or several. Raises ValueError where there is none, or where one has no token."""
    ids: dict[int, None] = {}
    for source, named in _named_ends(Path(checkpoint_dir), tokenizer):
        for token_id in named if isinstance(named, list | tuple) else [named]:
            known = type(token_id) is int and token_id >= 0 and tokenizer.convert_ids_to_tokens(token_id) is not None
            if not known:
                raise ValueError(
                    f"{checkpoint_dir}: {source} names end token id {token_id!r}, which the tokenizer does not have: "
                    "copy both files from one checkpoint"
                )
            ids[token_id] = None
    if not ids:
        raise ValueError(
            f"{checkpoint_dir} names no end token, so that no response would end: set eos_token_id in its "
            "generation_config.json"
        )
    return tuple(ids)


def _named_ends(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, object]]:
    """(where, what it says) of each place that names end tokens. The files are read as they are: a configuration class
    of transformers fills in an id of its own where a file is silent."""
    for name in ("generation_config.json", "config.json"):
        if not (checkpoint / name).is_file():
            continue
        with reading(checkpoint / name):
            fields = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            sections = [fields, fields.get("text_config") or {}]
            named = [section.get("eos_token_id") for section in sections]
        yield from ((name, ids) for ids in named if ids is not None)
    if tokenizer.eos_token_id is not None:
        yield "the tokenizer", tokenizer.eos_token_id


def check_pair(student_dir: str | Path, teacher_dir: str | Path, *, served: bool = False) -> PairReport:
    """Compare two checkpoints' vocabularies, what texts become, image tokens and end tokens. Raises ValueError when
    they differ, or do not fit the two heads. served: vLLM runs the teacher, so that it may be of any architecture."""
    student, teacher = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    size = check_vocabularies(student.get_vocab(), teacher.get_vocab(), str(student_dir), str(teacher_dir))
    served_teacher = ServedModel.from_pretrained(teacher_dir) if served else None
    heads = (Architecture.from_pretrained(student_dir), served_teacher or Architecture.from_pretrained(teacher_dir))
    rows = [head.vocab for head in heads]
    if size > min(rows):
        raise ValueError(
            f"{size} token ids do not fit the heads: {rows[0]} rows in {student_dir}, {rows[1]} in {teacher_dir}: "
            "a checkpoint's tokenizer belongs to another model"
        )
    for path in (student_dir,) if served else (student_dir, teacher_dir):
        check_names(path)
    if served_teacher is not None:
        _check_image_tokens(student_dir, teacher_dir, heads[0], served_teacher)
    _check_texts(student_dir, teacher_dir, student, teacher)
    _check_ends(student_dir, teacher_dir, student, teacher)
    return PairReport(size, *rows)


TEXTS = (
    "Let x = 1234567.89; then 3x² ≠ 10 (why?)",
    "  two spaces,\ttab\n\nand lines\r\n    def f(a): return a**2",
    "naïve café, Ångström, Ⅻ, ½, ﬁ, 中文字符, русский, 🙂👍🏽",
    "It's we'll THEY'RE don't \\boxed{\\frac{1}{2}} <b>&amp;</b> $\\alpha_1$",
)
"""What tokenizers that share a vocabulary may still divide differently: digits, spaces, capitals, composed letters."""


def _check_texts(
    student_dir: str | Path, teacher_dir: str | Path, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError for a text that two tokenizers of one vocabulary make other ids of: the teacher would score
    pieces that it has never seen in that place."""
    for text in TEXTS:
        ids, others = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher))
        if ids != others:
            at = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
            here, there = ids[at : at + 4], others[at : at + 4]
            raise ValueError(
                f"{teacher_dir} divides a text into other tokens than {student_dir} (at {teacher.decode(there)!r}: ids "
                f"{there} and {here}): choose a teacher of the student's tokenizer family"
            )


def _check_image_tokens(student_dir: str | Path, teacher_dir: str | Path, student: Architecture, teacher: ServedModel):
    """Raises ValueError for a teacher with eyes to which the student's image tokens are none."""
    if student.vision is None or not teacher.sees or teacher.image_token_id == student.vision.image_token_id:
        return
    raise ValueError(
        f"an image is token id {teacher.image_token_id} to {teacher_dir} and {student.vision.image_token_id} to "
        f"{student_dir}, whose prompts it cannot read: choose a teacher of the student's family, or one for text alone"
    )


def _check_ends(
    student_dir: str | Path, teacher_dir: str | Path, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """What the teacher ends with must stop the student, and what the student learns to end with must be an end to the
    teacher, which scores it."""
    student_ends, teacher_ends = stop_ids(student_dir, student), stop_ids(teacher_dir, teacher)
    if foreign := sorted(set(teacher_ends) - set(student_ends)):
        raise ValueError(
            f"{teacher_dir} ends a response with {_listed(_named(foreign, student))}, at which {student_dir} does not "
            f"stop (only at {_listed(_named(student_ends, student))}): add it to eos_token_id in its "
            f"generation_config.json, or let `vold prepare-student {student_dir} {teacher_dir} OUT_DIR` do it"
        )
    taught = turn_end(student, student_ends)
    if taught not in teacher_ends:
        raise ValueError(
            f"{student_dir} ends a response with {_listed(_named([taught], student))}, which ends none "
            f"of {teacher_dir} (only {_listed(_named(teacher_ends, student))}): choose a teacher that was trained on "
            "the same turns"
        )


def _named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    return [(token_id, str(tokenizer.convert_ids_to_tokens(token_id))) for token_id in ids]


def check_vocabularies(
    student: dict[str, int], teacher: dict[str, int], student_name: str = "student", teacher_name: str = "teacher"
) -> int:
    """The bound (largest id + 1) of two equal string → id maps. Raises ValueError naming the difference when they are
    not equal."""
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
    return max(student.values()) + 1


def missing_tokens(student: dict[str, int], teacher: dict[str, int]) -> list[tuple[int, str]]:
    """(id, string) of the teacher's tokens the student does not have, by id."""
    return sorted((i, s) for s, i in teacher.items() if s not in student)


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
    """Write a copy of the student to `out_dir` that has the teacher's extra tokens at the teacher's ids, and stops at
    the teacher's end tokens too.

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
    ends = dict.fromkeys((*stop_ids(student_dir, student), *stop_ids(teacher_dir, teacher)))

    def amend(directory: Path) -> None:
        student.save_pretrained(directory)
        _write_ends(directory / "generation_config.json", list(ends))

    return export_checkpoint(student_dir, out_dir, tensors, amend=amend)


def _write_ends(generation_config: Path, ends: list[int]) -> None:
    fields = json.loads(generation_config.read_text(encoding="utf-8")) if generation_config.is_file() else {}
    fields["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    generation_config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _with_mean_rows(weight_VD: Tensor, pieces: dict[int, list[int]]) -> Tensor:
    changed_VD = weight_VD.clone()
    for new_id, ids in pieces.items():
        changed_VD[new_id] = weight_VD[ids].float().mean(0).to(weight_VD.dtype)
    return changed_VD
