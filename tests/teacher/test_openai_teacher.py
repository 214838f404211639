"""A teacher behind an OpenAI-compatible server: what is sent, what is believed, and the gradient of what comes back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.completion_server import CompletionServer
from support.steps import assign_token_weights, batch_of, gradients, make_groups, make_teacher, make_trainer, relative
from vold.config.schema import ObjectiveConfig, OpenaiConfig, RlConfig, TeacherConfig
from vold.objectives import build_objective
from vold.run.run_dir import read_rows
from vold.teacher import TopTeacher, VllmTeacher
from vold.teacher.openai_server import OpenaiServer
from vold.train.rl import train_rl
from vold.types import Rollout

IDS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def model(tiny_teacher_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=torch.float32).eval()


@pytest.fixture
def serve(model):
    """serve(dialect, **settings) -> (server, OpenaiConfig)"""
    opened = []

    def open_server(dialect: str = "prompt_logprobs", **settings):
        server = CompletionServer(model, dialect, vocab_size=40)
        opened.append(server)
        return server, OpenaiConfig(url=server.url, model="teacher", **settings)

    yield open_server
    for server in opened:
        server.__exit__()


def rollouts(samples):
    return [Rollout(s.prompt, s.response_ids, [-1.0] * len(s.response_ids), "stop", "") for s in samples]


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_scores_are_those_of_the_trainers_teacher(dialect, serve, tiny_teacher_dir, layout):
    server, settings = serve(dialect)
    samples = assign_token_weights("opd", make_groups([[1.0, 0.0], [0.0, 0.0]]))
    (micro,) = make_teacher(tiny_teacher_dir, layout).score(batch_of(samples)).micro_batches
    teacher = VllmTeacher(tiny_teacher_dir, settings, temperature=1.0)
    for index, scores in enumerate(teacher.submit(rollouts(samples)).result()):
        expected = micro.logp_teacher_N[micro.sequence_N == micro.sample_B.index(index)]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-5)
    teacher.close()
    assert all(
        set(body) <= {"model", "prompt", "max_tokens", "temperature"} | FIELDS[dialect] for body in server.asked[2:]
    )


FIELDS = {"prompt_logprobs": {"prompt_logprobs"}, "echo": {"echo", "logprobs", "return_tokens_as_token_ids"}}


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_its_gradient_is_that_of_its_top_and_one_bucket(
    divergence, serve, model, tiny_student_dir, tiny_teacher_dir, layout
):
    """Where the top is all ids but one, that of a teacher in the trainer; in several micro-batches too."""
    _, settings = serve()
    objective = build_objective(ObjectiveConfig(preset="opd", divergence=divergence, top_k=5), 13)
    samples = objective.assign_token_weights(make_groups([[1.0, 0.0], [0.0, 0.0]]))
    trainer = make_trainer(tiny_student_dir, layout, objective=objective)
    scored = TopTeacher(tiny_teacher_dir, settings, layout, top_k=5).score(batch_of(samples, max_tokens=30))
    assert len(scored.micro_batches) > 1
    found = gradients(trainer, scored)
    student = trainer.logprobs(batch_of(samples))
    assert max(float(g.abs().max()) for g in found.values()) > 0 and student
    # the same buckets with a teacher in the trainer, whose choice is the student's top: equal where both have all ids
    all_ids = build_objective(ObjectiveConfig(preset="opd", divergence=divergence, top_k=39), 13)
    whole = build_objective(ObjectiveConfig(preset="opd", divergence=divergence), 13)
    top = TopTeacher(tiny_teacher_dir, settings, layout, top_k=39).score(batch_of(samples))
    inside = make_teacher(tiny_teacher_dir, layout, full_distributions=True).score(batch_of(samples))
    by_server = gradients(make_trainer(tiny_student_dir, layout, objective=all_ids), top)
    by_trainer = gradients(make_trainer(tiny_student_dir, layout, objective=whole), inside)
    assert relative(by_server, by_trainer) < 1e-3


@pytest.mark.parametrize("dialect", ["text", "none"])
def test_a_server_that_does_not_name_ids_is_refused(dialect, serve, tiny_teacher_dir):
    _, settings = serve(dialect)
    with pytest.raises(ValueError, match="gives no log-probs of a prompt's token ids") as error:
        VllmTeacher(tiny_teacher_dir, settings, temperature=1.0)
    assert "\n" not in str(error.value)


BAD = {
    "no json": (200, "<html>"),
    "no choices": (200, "{}"),
    "too few": (200, json.dumps({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": -1.0}}]}]})),
    "others": (200, json.dumps({"choices": [{"prompt_logprobs": [None] + [{"39": {"logprob": -1.0}}] * 3}]})),
    "nan": (
        200,
        json.dumps({"choices": [{"prompt_logprobs": [None, *({str(i): {"logprob": math.nan}} for i in IDS[1:])]}]}),
    ),
    "no number": (200, json.dumps({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": None}}]}]})),
    "busy": (503, "try later"),
    "limit": (429, "slow down"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_is_asked_for_again_and_then_missing(fault, serve, monkeypatch):
    from vold.rollout.vllm.engines import Request

    monkeypatch.setattr("vold.endpoint.MAX_PAUSE", 0.01)
    server, settings = serve(retries=1)
    engine = OpenaiServer(settings, IDS)
    request = Request(IDS, (), {}, scored=3)
    server.faults = [BAD[fault]]
    ((_, output),) = engine.stream([request])
    assert output is not None and len(output.scored) == 3
    server.faults = [BAD[fault]] * 2
    assert list(engine.stream([request])) == [(0, None)]


def test_a_refusal_ends_the_run_by_name(serve):
    from vold.rollout.vllm.engines import Request

    server, settings = serve()
    engine = OpenaiServer(settings, IDS)
    server.faults = [(404, "no such model")]
    with pytest.raises(ValueError, match="answers HTTP 404: no such model; look at openai") as error:
        list(engine.stream([Request(IDS, (), {}, scored=3)]))
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(serve, monkeypatch):
    monkeypatch.delenv("NOBODY_HAS_THIS", raising=False)
    _, settings = serve(api_key_env="NOBODY_HAS_THIS")
    with pytest.raises(ValueError, match="NOBODY_HAS_THIS: the environment has no such variable"):
        OpenaiServer(settings, IDS)


def test_lost_answers_take_all_terms_of_their_response(serve, tiny_teacher_dir, layout, monkeypatch):
    monkeypatch.setattr("vold.endpoint.MAX_PAUSE", 0.01)
    server, settings = serve(retries=0, concurrency=1)
    objective = build_objective(ObjectiveConfig(preset="vold-unmasked", divergence="reverse_kl", top_k=5), 13)
    samples = [replace(s, reference_weight=0.1) for s in objective.assign_token_weights(make_groups([[1.0, 0.0]]))]
    teacher = TopTeacher(tiny_teacher_dir, settings, layout, top_k=5)
    server.faults = [(500, "no")]
    (micro,) = teacher.score(batch_of(samples)).micro_batches
    assert teacher.metrics == {"teacher_failed": 1.0}
    lost = micro.kl_weight_N == 0
    assert 0 < int(lost.sum()) < len(lost) and micro.top_teacher[0].shape == (int((~lost).sum()), 5)
    assert (micro.pg_weight_N[lost] == 0).all() and (micro.reference_weight_N[lost] == 0).all()


@pytest.mark.parametrize(
    ("objective", "key"), [([], "kl_teacher"), (["objective.divergence=forward_kl", "objective.top_k=5"], "kl_teacher")]
)
def test_a_run_trains_with_it(objective, key, serve, load, world, layout, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32).eval()
    with CompletionServer(model, "prompt_logprobs") as server:
        config = load(
            "rl",
            tmp_path / "run",
            "teacher_engine=openai",
            f"teacher_openai={{url: '{server.url}', model: t}}",
            "steps=2",
            "save_every=0",
            "evaluation.every=0",
            "objective.target_kl=null",
            *objective,
        )
        train_rl(config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert len(rows) == 2 and all(row[key] > 0 and row["teacher_failed"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher_engine=openai"], "teacher_engine = 'openai' and teacher_openai belong together"),
        (["objective.divergence=jsd"], "a server gives its most probable ids, no whole distribution; set top_k"),
        (["rollout.temperature=0.7"], "a server's log-probs are those of temperature 1"),
    ],
)
def test_what_a_server_cannot_do_is_one_line(overrides, says, load, layout, tmp_path):
    server = "teacher_openai={url: 'http://127.0.0.1:9/v1', model: t}"
    given = overrides if overrides == ["teacher_engine=openai"] else ["teacher_engine=openai", server, *overrides]
    with pytest.raises(ValueError, match=says) as error:
        train_rl(load("rl", tmp_path / "run", *given))
    assert "\n" not in str(error.value)


def test_keys_of_another_engine_are_refused():
    server = {"url": "http://h:1/v1", "model": "m"}
    for keys, says in (
        ({"engine": "vllm", "offload": True}, "offload is not read"),
        ({"engine": "trainer", "vllm": {"kv_cache_gib": 1}}, "vllm is not read"),
        ({"engine": "vllm", "openai": server}, "openai is not read"),
        ({"engine": "openai"}, "needs the server"),
    ):
        with pytest.raises(ValueError, match=says):
            TeacherConfig(path="t", **keys)
    dumped = TeacherConfig(path="t", engine="trainer", offload=True).model_dump()
    assert TeacherConfig(**dumped).offload, "what a run saves can be read again"
    assert RlConfig.model_fields["teacher_openai"].default is None
