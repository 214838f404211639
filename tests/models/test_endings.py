"""End tokens, ids and heads as real checkpoints have them: which are read from where, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.data.responses import open_thought, response_ids, turn_end
from vold.data.traces import load_samples
from vold.models.checkpoint_reader import check_names
from vold.models.tokenizer import add_thinking_tokens, check_checkpoint, check_pair, id_bound, load_tokenizer, stop_ids
from vold.rollout.sampling_vocabulary import SamplingVocabulary

REAL = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizers are in ../shared/data/tokenizers")
PLAIN = PromptConfig(suffix="")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = {
    CHATML: ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    LLAMA: ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    GEMMA: ("<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"),
}


def checkpoint(
    directory: Path, template: str, *, eos: str | None, pad: str | None = None, generation=None, config=None, text=None
) -> Path:
    """A directory with tokenizer, template and configs, whose end tokens are named where the arguments say."""
    words = ["<unk>", *SPECIAL[template], "1", "2", "+", "user", "assistant", "model"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=eos, pad_token=pad)
    made.add_tokens(list(SPECIAL[template]), special_tokens=True)
    made.chat_template = template
    made.save_pretrained(directory)
    ids = made.convert_tokens_to_ids
    as_ids = lambda names: ids(names) if isinstance(names, str) else [ids(name) for name in names]  # noqa: E731
    (directory / "config.json").write_text(
        json.dumps(
            {"model_type": "qwen3", "vocab_size": 32}
            | ({"eos_token_id": as_ids(config)} if config else {})
            | ({"text_config": {"eos_token_id": as_ids(text)}} if text else {})
        )
    )
    if generation:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": as_ids(generation)}))
    return directory


# Where real checkpoints name their ends: (arguments, all stops, the taught end)
MEMBERS = {
    "qwen2.5 instruct": (
        (CHATML, dict(eos="<|im_end|>", generation=["<|im_end|>", "<|endoftext|>"], config="<|im_end|>")),
        {"<|im_end|>", "<|endoftext|>"},
        "<|im_end|>",
    ),
    "qwen2.5 base": (
        (CHATML, dict(eos="<|endoftext|>", pad="<|endoftext|>", generation="<|endoftext|>")),
        {"<|endoftext|>"},
        "<|endoftext|>",
    ),
    "the tokenizer only": ((CHATML, dict(eos="<|im_end|>")), {"<|im_end|>"}, "<|im_end|>"),
    "config.json only": ((CHATML, dict(eos=None, config="<|im_end|>")), {"<|im_end|>"}, "<|im_end|>"),
    "its text_config only": ((CHATML, dict(eos=None, text=["<|im_end|>"])), {"<|im_end|>"}, "<|im_end|>"),
    "tokenizer and generation config differ": (
        (CHATML, dict(eos="<|endoftext|>", generation="<|im_end|>")),
        {"<|im_end|>", "<|endoftext|>"},
        "<|im_end|>",
    ),
    "llama 3 instruct": (
        (LLAMA, dict(eos="<|eot_id|>", generation=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])),
        {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        "<|eot_id|>",
    ),
    "llama 3 base": (
        (LLAMA, dict(eos="<|end_of_text|>", config="<|end_of_text|>")),
        {"<|end_of_text|>"},
        "<|end_of_text|>",
    ),
    "gemma instruct": (
        (GEMMA, dict(eos="<eos>", pad="<pad>", generation=["<eos>", "<end_of_turn>"])),
        {"<eos>", "<end_of_turn>"},
        "<end_of_turn>",
    ),
}


@pytest.mark.parametrize(("where", "stops", "taught"), MEMBERS.values(), ids=MEMBERS)
def test_one_set_of_ends(where, stops, taught, tmp_path):
    """What SFT teaches is the end of the template's turn; sampler and evaluation stop there, at the pads too if they
    are ends; a text that carries its end already gets no second one."""
    path = checkpoint(tmp_path, where[0], **where[1])
    vocabulary = SamplingVocabulary.from_checkpoint(path)
    tokenizer = vocabulary.tokenizer
    names = lambda ids: set(tokenizer.convert_ids_to_tokens(list(ids)))  # noqa: E731
    assert names(vocabulary.stop_ids) == stops
    assert names([turn_end(tokenizer, vocabulary.stop_ids)]) == {taught}
    prompt = build_prompt(Problem("p", "1 + 1"), tokenizer, PLAIN)
    for text in ("2", f"2{taught}", f"2{taught}\n", "2" + "".join(sorted(stops))):
        assert names(response_ids(text, prompt, tokenizer, vocabulary.stop_ids)) == {"2", taught}
    for end in vocabulary.stop_ids:
        rollout = vocabulary.make_rollout(prompt, [tokenizer.convert_tokens_to_ids("2"), end, 0], [0.0] * 3, version=0)
        assert (rollout.finish_reason, rollout.text, len(rollout.response_ids)) == ("stop", "2", 2)
    with pytest.raises(ValueError, match="p: the response goes on behind the end token"):
        response_ids(f"2{taught}user", prompt, tokenizer, vocabulary.stop_ids)
    assert 0 <= vocabulary.pad_id < vocabulary.size


def test_ends_that_no_token_has_and_no_end_at_all_are_refused(tmp_path):
    path = checkpoint(tmp_path, CHATML, eos=None)
    with pytest.raises(ValueError, match=r"names no end token, .* generation_config\.json"):
        stop_ids(path, load_tokenizer(path))
    for wrong in (999, -1, "2", True, [3, 31]):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=r"generation_config\.json names end token id"):
            stop_ids(path, load_tokenizer(path))


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_base_student_beside_an_instruct_teacher_is_refused_and_can_be_prepared(
    tiny_student_dir, tiny_teacher_dir, tmp_path
):
    """The miniature's pad is what Qwen's base models end with."""
    student = shutil.copytree(tiny_student_dir, tmp_path / "student")
    for name in ("generation_config.json", "config.json"):
        edit(student / name, eos_token_id=0)
    config = json.loads((student / "config.json").read_text())
    edit(student / "config.json", text_config={**config["text_config"], "eos_token_id": 0})
    edit(student / "tokenizer_config.json", eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' \(id 1\), at which .*student does not stop.*prepare-student"):
        check_pair(student, tiny_teacher_dir)
    with pytest.raises(ValueError, match=r"ends a response with '<\|endoftext\|>' \(id 0\)"):
        check_pair(tiny_student_dir, student)
    prepared = add_thinking_tokens(student, tiny_teacher_dir, tmp_path / "prepared")
    check_pair(prepared, tiny_teacher_dir)
    vocabulary = SamplingVocabulary.from_checkpoint(prepared)
    assert vocabulary.stop_ids == (0, 1) and turn_end(vocabulary.tokenizer, vocabulary.stop_ids) == 1


# -- ids -----------------------------------------------------------------------------------------------------------


def with_token(source: Path, target: Path, token_id: int) -> Path:
    """A copy of a checkpoint whose tokenizer has `<done>` at an id beyond the others."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": token_id, "content": "<done>", **flags})
    tokenizer["model"]["vocab"]["<done>"] = token_id
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def test_ids_with_holes_are_bounded_by_the_largest(tiny_student_dir, tiny_teacher_dir, tmp_path):
    student = with_token(tiny_student_dir, tmp_path / "student", 60)
    teacher = with_token(tiny_teacher_dir, tmp_path / "teacher", 60)
    tokenizer = load_tokenizer(student)
    assert len(tokenizer) < id_bound(tokenizer) == 61 == check_checkpoint(student)
    assert check_pair(student, teacher).shared_vocab_size == 61
    vocabulary = SamplingVocabulary.from_checkpoint(student)
    assert (
        vocabulary.size == 61 and {len(tokenizer), 59} < set(vocabulary.banned_ids) and 60 not in vocabulary.banned_ids
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1", "response": "2<done>"}) + "\n")
    (sample,) = load_samples(
        DataConfig(path=tmp_path / "rows.jsonl", layout="prompt-response"), tokenizer, PLAIN, max_tokens=50
    )
    assert 60 in sample.response_ids


def test_ids_beyond_the_head_are_refused(tiny_student_dir, tmp_path):
    student = with_token(tiny_student_dir, tmp_path / "student", 64)
    with pytest.raises(ValueError, match="65 token ids do not fit the 64 head rows of"):
        check_checkpoint(student)


# -- heads ---------------------------------------------------------------------------------------------------------


def with_head(source: Path, target: Path, change: float, *, sharded: bool) -> Path:
    """A copy of a tied checkpoint that stores a head too: the embedding with one number changed."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    embedding = next(weight for name, weight in weights.items() if "embed_tokens" in name)
    head = embedding.clone()
    head[-1, -1] += change
    if not sharded:
        save_file({**weights, "lm_head.weight": head}, target / "model.safetensors", metadata={"format": "pt"})
        return target
    (target / "model.safetensors").rename(target / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": head}, target / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    files = {**dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    files["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return target


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_checkpoint_with_a_head_of_its_own_is_refused(sharded, tiny_student_dir, tiny_teacher_dir, tmp_path):
    """An equal one is fine. Students and teachers alike."""
    same = with_head(tiny_student_dir, tmp_path / "same", 0.0, sharded=sharded)
    assert check_pair(same, tiny_teacher_dir).student_head_rows == 64
    student = with_head(tiny_student_dir, tmp_path / "student", 1e-3, sharded=sharded)
    teacher = with_head(tiny_teacher_dir, tmp_path / "teacher", 1e-3, sharded=sharded)
    for check in (
        lambda: check_checkpoint(student),
        lambda: check_pair(student, tiny_teacher_dir),
        lambda: check_pair(tiny_student_dir, teacher),
    ):
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding.*tie_word_embeddings +true"):
            check()
    edit(teacher / "config.json", tie_word_embeddings=False)
    check_names(teacher)


# -- text ----------------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3"])
def test_a_prefilled_thought_belongs_to_the_response(family):
    """Also where `<think>` is spelled in three tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(REAL / "tokenizers" / f"{family}.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (REAL / "templates" / "qwen3-thinking.jinja").read_text()
    prompt = build_prompt(Problem("p", "What is 1+1?"), tokenizer, PLAIN)
    opening = open_thought(prompt.token_ids, tokenizer)
    assert tokenizer.decode(opening) == "<think>\n" and prompt.token_ids[-len(opening) :].tolist() == opening
    end = tokenizer.eos_token_id
    vocabulary = SamplingVocabulary(id_bound(tokenizer), (), (end, tokenizer.pad_token_id), tokenizer)
    thought = "1 and 1 is 2.\n</think>\n\n\\boxed{2}"
    for text in (thought, f"<think>\n{thought}", f"<think>{thought}", f"\n<think>\n{thought}<|im_end|>\n"):
        ids = response_ids(text, prompt, tokenizer, vocabulary.stop_ids)
        assert tokenizer.decode(ids) == f"{thought}<|im_end|>"
    rollout = vocabulary.make_rollout(prompt, ids, [0.0] * len(ids), version=0)
    assert rollout.text == f"<think>\n{thought}"
    with pytest.raises(ValueError, match="p: the response has no </think> and the chat template opens a thought"):
        response_ids("2", prompt, tokenizer)


def test_thinking_tags_that_are_special_tokens_stay_in_the_text(tiny_student_dir, tmp_path):
    student = shutil.copytree(tiny_student_dir, tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tags = {name: tokenizer["model"]["vocab"][name] for name in ("<think>", "</think>")}
    tokenizer["added_tokens"] += [{"id": i, "content": name, "special": True, **flags} for name, i in tags.items()]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    vocabulary = SamplingVocabulary.from_checkpoint(student)
    prompt = build_prompt(Problem("p", "1+1"), vocabulary.tokenizer, PLAIN)
    ids = vocabulary.tokenizer("<think>1</think>2<|endoftext|>", add_special_tokens=False)["input_ids"]
    rollout = vocabulary.make_rollout(prompt, [*ids, *vocabulary.stop_ids], [0.0] * (len(ids) + 1), version=0)
    assert rollout.text == "<think>1</think>2"
    assert torch.equal(torch.tensor(rollout.response_ids), torch.tensor([*ids, *vocabulary.stop_ids]))
