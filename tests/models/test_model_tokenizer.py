"""The tokenizer pair: the real Qwen2.5-VL and Qwen3 vocabularies, and the fix for a student without <think>."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from support import tiny
from vold.models.tokenizer import add_thinking_tokens, check_pair, check_vocabularies, extend_tokenizer, load_tokenizer

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
ADDED = {"<tool_response>": 151665, "</tool_response>": 151666, "<think>": 151667, "</think>": 151668}
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizers are in ../shared/data/tokenizers")


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    path = REAL / f"{name}.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>", pad_token="<|endoftext|>")


@real
def test_the_real_pair_is_refused_with_the_missing_tokens_their_ids_and_the_fix():
    with pytest.raises(ValueError, match="vold prepare-student student teacher OUT_DIR") as error:
        check_vocabularies(tokenizer("qwen2.5-vl").get_vocab(), tokenizer("qwen3").get_vocab())
    assert all(f"{s!r} (id {i})" in str(error.value) for s, i in ADDED.items())
    assert "\n" not in str(error.value)


@real
def test_the_real_student_extended_is_accepted_and_thinks_in_one_token():
    student, teacher = tokenizer("qwen2.5-vl"), tokenizer("qwen3")
    pieces = extend_tokenizer(student, teacher)
    assert pieces.keys() == set(ADDED.values())
    assert pieces[ADDED["<think>"]] == [13708, 766, 29]
    assert check_vocabularies(student.get_vocab(), teacher.get_vocab()) == 151669
    text = "<think>\nLet x = 3.</think> \\boxed{3}<|im_end|>"
    assert student.encode(text) == teacher.encode(text)
    assert student.decode(student.encode(text), skip_special_tokens=True) == text.removesuffix("<|im_end|>")


@real
def test_the_real_student_extended_survives_saving(tmp_path):
    student, teacher = tokenizer("qwen2.5-vl"), tokenizer("qwen3")
    extend_tokenizer(student, teacher)
    student.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == teacher.get_vocab()


def words(*extra: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that spells `<think>` as `<`, `think`, `>` unless it has the token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = ["<unk>", "<eos>", "<", "think", ">", "</", "x"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(alphabet)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    made.add_tokens(list(extra))
    return made


def checkpoint(directory: Path, model, made: PreTrainedTokenizerFast) -> Path:
    model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id = made.eos_token_id
    tiny.save(model, directory)
    made.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_student_adds_rows_that_are_means_of_the_pieces(tied, tmp_path):
    student = checkpoint(tmp_path / "student", tiny.qwen2_5_vl(tied=tied), words())
    teacher = checkpoint(tmp_path / "teacher", tiny.qwen3(vocab_size=160), words("<think>", "</think>"))
    with pytest.raises(ValueError, match=r"'<think>' \(id 7\), '</think>' \(id 8\)"):
        check_pair(student, teacher)
    prepared = add_thinking_tokens(student, teacher, tmp_path / "prepared")
    report = check_pair(prepared, teacher)
    assert (report.shared_vocab_size, report.student_head_rows, report.teacher_head_rows) == (9, 128, 160)
    before, after = (AutoModelForImageTextToText.from_pretrained(d).state_dict() for d in (student, prepared))
    for name in before:
        expected = before[name].clone()
        if name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            expected[7], expected[8] = expected[[2, 3, 4]].mean(0), expected[[5, 3, 4]].mean(0)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-7)


def test_prepare_student_of_a_complete_student_changes_nothing(tmp_path):
    student = checkpoint(tmp_path / "student", tiny.qwen3(), words("<think>"))
    prepared = add_thinking_tokens(student, student, tmp_path / "prepared")
    before, after = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (student, prepared))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, "'a' is id 0 in student but 1 in teacher"),
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, r"teacher lacks 'b' \(id 1\) of student"),
    ],
)
def test_differing_vocabularies_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        check_vocabularies(student, teacher)


def test_a_vocabulary_larger_than_a_head_names_both_heads(tmp_path):
    student = checkpoint(tmp_path / "student", tiny.qwen3(), words("<think>"))
    teacher = checkpoint(tmp_path / "teacher", tiny.qwen3(vocab_size=6), words("<think>"))
    with pytest.raises(ValueError, match=r"8 token ids do not fit the heads: 128 rows in .*student, 6 in .*teacher"):
        check_pair(student, teacher)


def test_the_miniature_pair_passes(tiny_student_dir, tiny_teacher_dir):
    report = check_pair(tiny_student_dir, tiny_teacher_dir)
    assert report.student_head_rows == report.teacher_head_rows >= report.shared_vocab_size


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
