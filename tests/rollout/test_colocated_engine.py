"""ColocatedEngine and its vLLM: who is awake when. vLLM's sleep mode needs a GPU, so `vllm` is a stand-in here that
refuses what a sleeping engine cannot do; the calls are those of vLLM 0.32."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from vold.config.schema import VllmConfig
from vold.rollout.vllm.engines import ColocatedEngine, Request

REQUESTS = [Request((5, 6), (), {"n": 1}) for _ in range(3)]


class StandIn:
    """vLLM's `LLM`. One request is finished a step, the last one first."""

    def __init__(self, **options):
        self.options, self.calls, self.waiting, self.asleep = options, [], [], set()
        self.llm_engine = self
        self.engine_core = SimpleNamespace(_finalizer=SimpleNamespace(detach=lambda: None))

    def collective_rpc(self, method: str, args: tuple) -> None:
        assert "weights" not in self.asleep
        self.calls.append(method)

    def enqueue(self, prompts: list, params: list, use_tqdm: bool) -> list[str]:
        assert not self.asleep
        self.waiting = [f"{40 + place}-random" for place in range(len(prompts))]
        return list(self.waiting)

    def step(self) -> list[SimpleNamespace]:
        assert not self.asleep
        self.calls.append("step")
        name = self.waiting.pop().removesuffix("-random")
        choice = SimpleNamespace(token_ids=[int(name)], logprobs=[{int(name): SimpleNamespace(logprob=-0.5)}])
        return [SimpleNamespace(request_id=name, finished=True, outputs=[choice], prompt_logprobs=None)]

    def abort_request(self, names: list[str]) -> None:
        self.calls.append(f"abort {len(names)}")
        self.waiting = []

    def sleep(self, level: int) -> None:
        assert not self.waiting
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        assert self.asleep >= set(tags)
        self.calls.append("wake " + "+".join(tags))
        self.asleep -= set(tags)

    def reset_mm_cache(self) -> None: ...
    def reset_encoder_cache(self) -> None: ...
    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def opened(tiny_student_dir, monkeypatch):
    """An engine on what pretends to be a GPU, and the calls to its vLLM from here on."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=lambda **params: params))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**30, 140 * 2**30))

    def opened(**settings) -> tuple[ColocatedEngine, list[str]]:
        engine = ColocatedEngine(tiny_student_dir, VllmConfig(**settings), dtype=torch.float32)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine._llm.calls.append("empty torch's cache"))
        return engine, engine._llm.calls

    return opened


def test_it_sleeps_between_calls(opened):
    engine, calls = opened(sleep=True)
    assert engine._llm.options["enable_sleep_mode"] and calls == ["prepare_policy", "sleep 1"]
    calls.clear()
    found = dict(engine.stream(REQUESTS))
    assert {place: answer.responses[0].ids for place, answer in found.items()} == {0: [40], 1: [41], 2: [42]}
    assert calls == ["empty torch's cache", "wake weights+kv_cache", "step", "step", "step", "sleep 1"]


def test_new_weights_wake_no_more_than_they_need(opened):
    """Keys and values come back when something is sampled: until then their memory is the trainer's."""
    engine, calls = opened(sleep=True)
    calls.clear()
    engine.load_weights([], 1)
    assert calls == ["empty torch's cache", "wake weights", "load_policy"]
    calls.clear()
    list(engine.stream(REQUESTS[:1]))
    assert calls == ["empty torch's cache", "wake kv_cache", "step", "sleep 1"]


def test_a_stream_that_is_left_is_aborted_before_sleep(opened):
    engine, calls = opened(sleep=True)
    stream = engine.stream(REQUESTS)
    assert next(stream)[0] == 2
    calls.clear()
    stream.close()
    assert calls == ["abort 2", "sleep 1"]


def test_it_stays_awake_unless_told_to_sleep(opened):
    engine, calls = opened()
    list(engine.stream(REQUESTS))
    engine.load_weights([], 1)
    assert not engine._llm.options["enable_sleep_mode"]
    assert calls == ["prepare_policy", "step", "step", "step", "load_policy"]


def test_sleep_without_a_gpu_is_one_line(tiny_student_dir):
    with pytest.raises(ValueError, match=r"vllm.sleep = true needs a GPU.*leave it out"):
        ColocatedEngine(tiny_student_dir, VllmConfig(sleep=True), dtype=torch.float32)


def test_only_an_engine_inside_the_process_sleeps():
    with pytest.raises(ValueError, match=r"vllm.sleep = true is for an engine inside the process"):
        VllmConfig(sleep=True, urls=("http://127.0.0.1:8000",))
