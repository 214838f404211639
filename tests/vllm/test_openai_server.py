"""vLLM's own OpenAI server as a teacher: log-probs by token id, by both of its ways, and its gradient."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from engines import PATIENCE

from support.steps import batch_of, gradients, make_groups, make_trainer, relative
from vold.config.schema import ObjectiveConfig, OpenaiConfig
from vold.objectives import build_objective
from vold.teacher import Teacher, TopTeacher, VllmTeacher
from vold.teacher.openai_server import OpenaiServer
from vold.types import Rollout

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(tiny_teacher_dir, tmp_path_factory):
    """`vllm serve` as anybody starts it, with room for the whole vocabulary of the miniature."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("openai") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_teacher_dir)]
    command += ["--served-model-name", "teacher", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--max-logprobs", "200", "--enforce-eager", "--max-model-len", "256"]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=log.open("a"), stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5.0):
                break
        except OSError:
            time.sleep(0.5)
    else:
        raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
    yield OpenaiConfig(url=f"http://127.0.0.1:{port}/v1", model="teacher", retries=0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def samples():
    objective = build_objective(ObjectiveConfig(preset="opd"), 13)
    return objective.assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_scores_by_both_ways(way, server, samples, tiny_teacher_dir, layout, monkeypatch):
    if way == "echo":
        post = OpenaiServer._post
        echo = {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}

        def by_echo(self, ids, fields):
            return {"logprobs": post(self, ids, echo)["logprobs"]}

        monkeypatch.setattr(OpenaiServer, "_post", by_echo)
    numbers = {
        "dtype": torch.float32,
        "vocab_size": 64,
    }  # the server has its whole head
    (micro,) = Teacher(tiny_teacher_dir, layout, **numbers).score(batch_of(samples)).micro_batches
    teacher = VllmTeacher(tiny_teacher_dir, server, temperature=1.0)
    asked = [Rollout(s.prompt, s.response_ids, [-1.0] * len(s.response_ids), "stop", "") for s in samples]
    for index, scores in enumerate(teacher.submit(asked).result()):
        expected = micro.logp_teacher_N[micro.sequence_N == micro.sample_B.index(index)]
        assert (torch.tensor(scores) - expected).abs().max() < 1e-4
    teacher.close()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_its_top_has_the_gradient_of_the_whole(divergence, server, samples, tiny_student_dir, tiny_teacher_dir, layout):
    """With all but a few ids in the top, that of a teacher in the trainer, over the same rows of the head."""
    rows = 64  # of the miniature
    gradients_of = {}
    for top_k in (None, 63):
        objective = build_objective(ObjectiveConfig(preset="opd", divergence=divergence, top_k=top_k), 13)
        trainer = make_trainer(tiny_student_dir, layout, objective=objective)
        trainer.vocab_size = rows
        if top_k is None:
            numbers = {"dtype": torch.float32, "vocab_size": rows, "full_distributions": True}
            scored = Teacher(tiny_teacher_dir, layout, **numbers).score(batch_of(samples))
        else:
            scored = TopTeacher(tiny_teacher_dir, server, layout, top_k=top_k).score(batch_of(samples))
        gradients_of[top_k] = gradients(trainer, scored)
    assert relative(gradients_of[63], gradients_of[None]) < 1e-2
