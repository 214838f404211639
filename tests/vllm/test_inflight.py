"""New weights while responses are being sampled, in a real vLLM engine: what has begun goes on, and every token says
which weights it is from."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from engines import Engine
from test_sampler import CPU, all_logits, other_weights, prompts  # noqa: F401 - a fixture

from vold.config.schema import EngineConfig, SamplingConfig, VllmConfig
from vold.rollout import TransformersSampler, open_sampler

pytestmark = pytest.mark.vllm
TOKENS = 160


@pytest.fixture(scope="module")
def engine(tiny_student_dir, tmp_path_factory):
    """One that takes weights by a stream too."""
    found = Engine(tiny_student_dir, tmp_path_factory.mktemp("engine") / "engine.log")
    try:
        found.wait()
        yield found
    finally:
        found.kill()


@pytest.mark.parametrize("transport", ["files", "nccl"])
def test_responses_go_on_with_the_new_weights(engine, tiny_student_dir, prompts, transport):  # noqa: F811
    """Tokens before the update have the old weights' log-probs, those after it the new weights' over the same text,
    behind images too, and no response is lost, cut off or begun anew."""
    settings = VllmConfig(urls=(engine.url,), secret_file=engine.secret_file, transport=transport)
    config = EngineConfig(engine="vllm", vllm=settings)
    policy = open_sampler(config, tiny_student_dir, dtype=torch.float32, device=CPU, keep_requests=True)
    of_version: dict[int, TransformersSampler] = {}
    continued = 0
    for version in range(1, 5):
        weights = list(other_weights(tiny_student_dir, version))
        of_version[version] = TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)
        of_version[version].load_weights(weights)
        sampled: list = []
        asked = SamplingConfig(max_new_tokens=TOKENS, temperature=1.0)
        draw = partial(policy.sample, prompts * 3, asked, responses=4, seed=version)
        thread = threading.Thread(target=lambda draw=draw, sampled=sampled: sampled.extend(draw()))
        if version > 1:
            thread.start()
            thread.join(0.2 * version)
        policy.load_weights(weights)
        if version > 1:
            thread.join(120.0)
            assert len(sampled) == 12 * len(prompts)
            mixed = [rollout for rollout in sampled if rollout.versions is not None]
            for rollout in [*mixed, *sampled[:4]]:
                _check(rollout, of_version, {version - 1, version})
            continued += len(mixed)
            olds = sorted(int((rollout.versions < version).sum()) for rollout in mixed)
            print(f"{transport}, update {version}: {len(mixed)} of {len(sampled)} went on after {olds[:3]} … tokens")
    assert continued, "an update came on the way"


def _check(rollout, of_version, allowed: set[int]) -> None:
    versions = np.full(len(rollout.response_ids), rollout.version)
    versions = versions if rollout.versions is None else rollout.versions
    assert (np.diff(versions) >= 0).all() and set(versions.tolist()) <= allowed
    for version in sorted(set(versions.tolist())):
        with torch.no_grad():
            logits = all_logits(of_version[version], rollout).log_softmax(-1)
        expected = logits.gather(1, torch.tensor(rollout.response_ids.tolist())[:, None])[:, 0].numpy()
        gap = np.abs(expected - rollout.logp_rollout)[versions == version].max()
        assert gap < 2e-4, f"weights {version} of {versions.tolist()}"
