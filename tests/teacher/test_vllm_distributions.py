"""VllmDistributions with engines over HTTP: every response's own hidden states, or none of its loss. `make test-vllm`
compares the divergence with that of a teacher in the trainer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.fake_engine import FakeEngine
from vold.config.schema import VllmConfig
from vold.data.packing import pack
from vold.miniature.models import HIDDEN
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.head import load_head
from vold.rollout.vllm import hidden_states
from vold.rollout.vllm.hidden_states import ASK, Tap, from_json, to_json
from vold.teacher import VllmDistributions
from vold.types import Prompt, Sample

IDS = [(11, (21, 22)), (12, (23,)), (13, (24, 25, 26))]
SAMPLES = [Sample(Prompt(f"p{first}", (first, 8, 9), ""), response, 0.5, 1.0, 2.0) for first, response in IDS]
SAMPLES.append(Sample(SAMPLES[0].prompt, (27,), 0.5, 1.0, 0.0))  # without a KL term


@pytest.fixture
def engine():
    engine = FakeEngine()
    engine.width = HIDDEN
    yield engine
    engine.stop()


@pytest.fixture
def teacher(engine, tiny_teacher_dir, layout, monkeypatch):
    monkeypatch.setattr(VllmDistributions, "_compare", lambda *_: None)  # the engine is no model
    return connect(engine, tiny_teacher_dir, layout)


def connect(engine, checkpoint, layout) -> VllmDistributions:
    settings = VllmConfig(urls=(engine.url,), restart_seconds=0.0, retries=1)
    rows = Architecture.from_pretrained(checkpoint).vocab
    return VllmDistributions(checkpoint, settings, layout, dtype=torch.float32, vocab_size=40, student_rows=rows)


def test_each_token_gets_its_own_row(teacher):
    (micro,) = teacher.score(pack(SAMPLES, max_tokens=100)).micro_batches
    scored_n = micro.kl_weight_N != 0
    assert micro.hidden_teacher_nE.shape == (6, HIDDEN) and int(scored_n.sum()) == 6
    assert micro.hidden_teacher_nE[:, 0].tolist() == micro.target_N[scored_n].tolist()
    assert micro.head_teacher_UE.shape[1] == HIDDEN and teacher.metrics == {"teacher_failed": 0.0}


@pytest.mark.parametrize(
    "fault", ["500", "nan", "no hidden states", "too few bytes", "hidden states of another length"]
)
def test_a_response_without_its_rows_has_no_loss_and_is_named(engine, teacher, capfd, fault):
    engine.fault, engine.victim = fault, 12
    (micro,) = teacher.score(pack(SAMPLES, max_tokens=100)).micro_batches
    lost_N = micro.target_N == 23
    assert int(lost_N.sum()) == 1 and not micro.kl_weight_N[lost_N].any() and not micro.pg_weight_N[lost_N].any()
    assert micro.pg_weight_N[~lost_N].all(), "the others keep their loss"
    assert micro.hidden_teacher_nE[:, 0].tolist() == micro.target_N[micro.kl_weight_N != 0].tolist()
    assert teacher.metrics == {"teacher_failed": 1.0}
    assert "the teacher did not score a response to prompt p12: it is left out of the loss" in capfd.readouterr().err


def test_an_engine_with_other_weights_is_one_line(engine, tiny_teacher_dir, layout):
    with pytest.raises(
        ValueError, match=r"are \d.* nats from the engine's own: .* set objective.divergence=k2"
    ) as error:
        connect(engine, tiny_teacher_dir, layout)
    assert "\n" not in str(error.value)


def test_an_engine_of_another_width_is_one_line(engine, tiny_teacher_dir, layout):
    engine.width = 8
    with pytest.raises(ValueError, match=f"8 wide and the head {HIDDEN}: the engine serves another checkpoint"):
        connect(engine, tiny_teacher_dir, layout)


# -- the head ------------------------------------------------------------------------------------------------------


def test_a_head_is_divided_as_the_students(tiny_teacher_dir, layout):
    """Of another number of rows: cut, or followed by rows of zeros, which no id of the vocabulary has."""
    stored = load_file(tiny_teacher_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_head(tiny_teacher_dir, layout, torch.float32, len(stored)), stored)
    assert torch.equal(load_head(tiny_teacher_dir, layout, torch.float32, 48), stored[:48])
    second = SimpleNamespace(tp=2, tp_rank=1, device=torch.device("cpu"))
    longer = load_head(tiny_teacher_dir, second, torch.float32, 2 * len(stored) - 8)
    assert torch.equal(longer, torch.cat([stored[len(stored) - 4 :], torch.zeros(len(stored) - 8, HIDDEN)]))


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_that_are_no_product_are_refused_by_name(tiny_teacher_dir, layout, tmp_path, field):
    checkpoint = export_checkpoint(tiny_teacher_dir, tmp_path / "teacher", [])
    config = json.loads((checkpoint / "config.json").read_text()) | {field: 30.0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field} = 30.0 in config.json: .* set objective.divergence=k2"):
        load_head(checkpoint, layout, torch.float32, 64)


# -- the worker's side ---------------------------------------------------------------------------------------------


class Runner:
    """As much of vLLM's model runner as the tap reads: requests, and where each one's tokens lie in a step."""

    def __init__(self, requests: dict):
        self.requests, self.calls = requests, 0
        self.input_batch = SimpleNamespace(req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=None)

    def _get_prompt_logprobs_dict(self, hidden, scheduled) -> dict:
        self.calls += 1
        return {}

    def step(self, scheduled: dict[str, int]) -> None:
        """Every row of the hidden states is full of its position in its prompt."""
        starts = [0]
        for index, (name, tokens) in enumerate(scheduled.items()):
            self.input_batch.req_id_to_index[name] = index
            starts.append(starts[-1] + tokens)
        self.query_start_loc.np = np.array(starts)
        positions = [self.requests[name].num_computed_tokens + i for name, n in scheduled.items() for i in range(n)]
        hidden = torch.tensor(positions, dtype=torch.bfloat16)[:, None].expand(-1, 4)
        assert self._get_prompt_logprobs_dict(hidden, scheduled) == {}
        for name, tokens in scheduled.items():
            self.requests[name].num_computed_tokens += tokens


def asking(name: str, length: int, count: int) -> SimpleNamespace:
    params = SimpleNamespace(extra_args={ASK: [name, count]} if count else None)
    return SimpleNamespace(sampling_params=params, prompt_token_ids=[0] * length, num_computed_tokens=0)


def test_rows_are_kept_in_parts_beside_others_and_again_after_a_preemption():
    runner = Runner({"a": asking("A", 10, 4), "b": asking("", 6, 0), "c": asking("C", 3, 2)})
    tap = Tap(runner)
    runner.step({"b": 6, "a": 3, "c": 3})
    runner.step({"b": 1, "a": 4})  # positions 3 to 6; b samples
    assert tap.take("A") is None, "not all of them are there"
    runner.requests["a"].num_computed_tokens = 0
    runner.step({"a": 6})
    runner.step({"c": 1, "a": 5})  # one token is sampled behind the prompt
    rows = tap.take("A")
    assert rows[:, 0].tolist() == [5, 6, 7, 8] and rows.dtype == torch.bfloat16
    assert tap.take("C")[:, 0].tolist() == [0, 1] and tap.take("A") is None and runner.calls == 4


def test_what_nobody_takes_is_dropped(monkeypatch):
    monkeypatch.setattr(hidden_states, "KEPT_BYTES", 100)  # 8 bytes a row
    runner = Runner({str(i): asking(str(i), 6, 5) for i in range(4)})
    tap = Tap(runner)
    runner.step({str(i): 6 for i in range(4)})
    assert [tap.take(str(i)) is None for i in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_json_keeps_every_bit(dtype):
    rows = torch.randn(3, 5).to(dtype)
    sent = json.loads(json.dumps(to_json(rows)))
    assert torch.equal(from_json(sent), rows) and from_json(sent).dtype == dtype


@pytest.mark.parametrize(
    "value", [None, {}, ["float64", 1, 1, ""], ["bfloat16", 1, 1, "!!"], ["float32", 1, 1, "AAAA"]]
)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError):
        from_json(value)
