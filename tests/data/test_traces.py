"""Traces on disk: what is added is there after a kill, whole lines only; ids go through Parquet unchanged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import load_dataset

from vold.config.schema import DataConfig, PromptConfig
from vold.data.traces import TraceShard, load_samples
from vold.types import Prompt, Rollout

# "he" + "llo" and the single token "hello" are the same text: ids that no tokenizer would give for it must survive
PROMPTS = tuple(Prompt(f"p:{n}", (5, n, 151_667), f"<|im_start|>{n}", str(n)) for n in range(4))


def answer(number: int, *ids: int, finish_reason: str = "stop") -> Rollout:
    return Rollout(PROMPTS[number], ids, (-0.5,) * len(ids), finish_reason, "hello\n\u2028\x00")


@pytest.fixture
def shard(tmp_path) -> TraceShard:
    return TraceShard(tmp_path / "traces", 3, PROMPTS, max_tokens=7)


def test_ids_are_the_teachers_in_the_order_of_the_prompts(shard):
    shard.add([answer(2, 15_339, 385, 151_645)])
    shard.add([answer(0, 24_748, 151_645)])
    assert shard.answered() == {"p:0", "p:2"} and not shard.is_finished
    shard.add([answer(1, 1, 2, 3, 4), answer(3, 9, finish_reason="length")])
    shard.finish()
    assert shard.is_closed and [path.name for path in shard.directory.iterdir()] == ["shard-00003.parquet"]
    rows = load_dataset("parquet", data_files=str(shard.path), split="train", keep_in_memory=True)
    assert rows["prompt_id"] == ["p:0", "p:2"], "7 tokens with the prompt is too long, and one is truncated"
    assert rows["response_ids"] == [[24_748, 151_645], [15_339, 385, 151_645]]
    assert rows["prompt_ids"] == [[5, 0, 151_667], [5, 2, 151_667]]
    assert rows[0]["response"] == "hello\n\u2028\x00" and rows[0]["prompt"] == "<|im_start|>0"
    counts = {"asked": 4, "kept": 2, "truncated": 1, "too_long": 1, "failed": 0, "sampled_tokens": 10, "kept_tokens": 5}
    assert shard.counts() == counts


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_that_was_not_written_to_its_end_is_dropped(shard, cut):
    shard.add([answer(0, 1, 2)])
    shard.add([answer(1, 3), answer(2, 4)])
    content = shard.part.read_bytes()
    shard.part.write_bytes(content[:-cut])
    assert shard.answered() == {"p:0"}, "what arrived together is there together or not at all"
    shard.repair()
    shard.add([answer(1, 3), answer(2, 4)])
    assert shard.part.read_bytes() == content


def test_blocks_that_never_reached_the_disk(shard):
    shard.add([answer(0, 1, 2)])
    with shard.part.open("ab") as file:
        file.write(b"\x00" * 100 + b"\n")
    shard.repair()
    shard.add([answer(1, 3)])
    assert shard.answered() == {"p:0", "p:1"}


def test_prompts_without_an_answer_are_counted_as_failed_and_a_shard_may_be_empty(shard):
    shard.finish()
    assert shard.counts()["failed"] == 4 and shard.counts()["kept"] == 0
    other = replace(shard, number=4)
    other.add([answer(0, 1)])
    other.finish()
    files = [str(shard.path), str(other.path)]
    assert len(load_dataset("parquet", data_files=files, split="train", keep_in_memory=True)) == 1


def test_a_kill_between_the_rename_and_the_removal_of_the_part(shard):
    shard.add([answer(0, 1)])
    part = shard.part.read_bytes()
    shard.finish()
    shard.part.write_bytes(part)
    assert shard.answered() == {prompt.id for prompt in PROMPTS} and not shard.is_closed
    shard.finish()
    assert shard.is_closed and shard.counts()["kept"] == 1


def test_answers_to_other_prompts_are_refused_in_one_line(shard):
    others = replace(shard, prompts=tuple(replace(prompt, token_ids=(*prompt.token_ids, 1)) for prompt in PROMPTS))
    shard.add([answer(0, 1)])
    with pytest.raises(ValueError, match=r"shard-00003.part.jsonl answers other prompts than data.path now holds"):
        others.answered()
    shard.finish()
    with pytest.raises(ValueError, match=r"shard-00003.parquet answers other prompts"):
        others.answered()
    shard.path.write_bytes(shard.path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"shard-00003.parquet is damaged .*; delete it") as error:
        shard.counts()
    assert "\n" not in str(error.value)


# Of the tokenizer nothing is asked but its ids; without a template, prompts stay as they were asked.
IDS = SimpleNamespace(get_vocab=lambda: {"</think>": 151_668}, chat_template=None)


def test_sft_reads_them_as_they_are(shard):
    shard.add([answer(0, 7, 8), answer(1, 9), answer(2, 6, 6, 6)])
    shard.finish()
    config = DataConfig(path=shard.directory, layout="traces")
    samples = load_samples(config, IDS, PromptConfig(), max_tokens=5)
    rows = [(sample.prompt, sample.response_ids.tolist()) for sample in samples]
    assert rows == [(PROMPTS[0], [7, 8]), (PROMPTS[1], [9])]
    limited = load_samples(config.model_copy(update={"limit": 1}), IDS, PromptConfig(), max_tokens=6)
    assert len(limited) == 1
    replace(shard, number=4).add([answer(3, 1)])
    with pytest.raises(
        ValueError, match=r"shard-00004.part.jsonl is not finished; continue `vold traces` with --resume"
    ):
        load_samples(config, IDS, PromptConfig(), max_tokens=6)
    replace(shard, number=4).part.unlink()
    with pytest.raises(ValueError, match=r"holds no trace of at most max_tokens = 3"):
        load_samples(config, IDS, PromptConfig(), max_tokens=3)
