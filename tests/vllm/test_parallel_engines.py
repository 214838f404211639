"""Engines over two devices: the answers of one, before and after weights arrive. Real vLLM, two worker processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from engines import Engine
from test_sampler import CPU, ENGINE, agree, other_weights, prompts  # noqa: F401 - a fixture

from vold.config.schema import VllmConfig
from vold.rollout import TransformersSampler, open_sampler

pytestmark = pytest.mark.vllm

TWO = {"tensor_parallel_size": 2, "engine_options": {"max_num_seqs": 16}}


def follow_weights(config, prompts, student_dir) -> None:  # noqa: F811
    """Both engines agree with every set of weights, and the sets differ."""
    vllm = open_sampler(config, student_dir, dtype=torch.float32, device=CPU)
    pair = vllm, TransformersSampler(student_dir, dtype=torch.float32, device=CPU)
    found = [agree(pair, prompts)]
    for seed in (1, 2):
        for sampler in pair:
            sampler.load_weights(iter(other_weights(student_dir, seed)))
        found.append(agree(pair, prompts))
        for prompt in prompts:
            ours, theirs = (sampler.score(prompt, (5, 6, 7)) for sampler in pair)
            assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    assert len({tuple(ids) for ids in found}) == 3, "the weights matter"


def test_inside_the_process(prompts, tiny_student_dir, tmp_path):  # noqa: F811
    settings = ENGINE.vllm.model_copy(update={**TWO, "weights_dir": tmp_path})
    follow_weights(ENGINE.model_copy(update={"vllm": settings}), prompts, tiny_student_dir)
    assert not list(tmp_path.iterdir()), "weights of the way are removed"


def test_behind_http_by_a_stream_to_each_shard(prompts, tiny_student_dir, tmp_path):  # noqa: F811
    engine = Engine(tiny_student_dir, tmp_path / "log", **TWO)
    try:
        engine.wait()
        settings = VllmConfig(urls=(engine.url,), secret_file=engine.secret_file, transport="nccl")
        follow_weights(ENGINE.model_copy(update={"vllm": settings}), prompts, tiny_student_dir)
    finally:
        engine.kill()
