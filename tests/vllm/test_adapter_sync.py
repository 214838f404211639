"""The policy as adapters in real vLLM, in the process and behind `vold serve`: transformers' answers with the merged
weights, before and after each update. And a trained vision tower's weights, which arrive with the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from engines import Engine
from test_sampler import CPU, ENGINE, agree, open_pair, prompts  # noqa: F401 - a fixture

from vold.config.schema import AdapterConfig, EngineConfig, VllmConfig
from vold.models.student import load_chunks
from vold.models.weight_rules import trained_rules
from vold.models.weights import export_adapters, export_weights
from vold.rollout import TransformersSampler, open_sampler
from vold.rollout.vllm.adapters import EngineAdapter

pytestmark = pytest.mark.vllm
ADAPTER = AdapterConfig(rank=5, alpha=10, rslora=True, sync="adapter")
RESPONSE = tuple(range(8, 20))


def change(chunk, seed: int, size: float) -> None:
    """Other values of everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter, _ in trained_rules(chunk):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def check_versions(pair, student, layout, prompts) -> None:  # noqa: F811
    """Three versions, the third equal to the first: ids and log-probs of samples, and scores."""
    (chunk,) = load_chunks(student, layout, torch.float32, adapter=ADAPTER)
    found = [agree(pair, prompts)]
    for seed in (1, 2, 1):
        change(chunk, seed, 0.2)
        for sampler, weights in zip(pair, (export_adapters([chunk]), export_weights([chunk])), strict=True):
            sampler.load_weights(weights)
        found.append(agree(pair, prompts * 3)[: len(prompts)])
        for prompt in prompts:
            ours, theirs = (sampler.score(prompt, RESPONSE) for sampler in pair)
            assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    assert found[1] == found[3] and len({tuple(ids) for ids in found}) == 3, "adapters matter"


def test_adapters_inside_the_process(tiny_student_dir, layout, prompts):  # noqa: F811
    engine = open_sampler(ENGINE, tiny_student_dir, dtype=torch.float32, device=CPU, adapter=ADAPTER)
    pair = engine, TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)
    check_versions(pair, tiny_student_dir, layout, prompts)
    assert engine._engines._llm.llm_engine.list_loras() == {3}, "one version is there"


@pytest.fixture(scope="module")
def served(tiny_student_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    adapter = EngineAdapter(ADAPTER, tiny_student_dir)
    engine = Engine(tiny_student_dir, folder / "log", adapter=adapter, transport="files", weights_dir=folder)
    try:
        engine.wait()
        yield engine, VllmConfig(urls=(engine.url,), secret_file=engine.secret_file, weights_dir=folder)
    finally:
        engine.kill()


def test_adapters_behind_http(served, tiny_student_dir, layout, prompts):  # noqa: F811
    """Also into an engine that was started again."""
    engine, settings = served
    options = {"dtype": torch.float32, "device": CPU, "adapter": ADAPTER}
    config = EngineConfig(engine="vllm", vllm=settings)
    sampler = open_sampler(config, tiny_student_dir, **options)
    pair = sampler, TransformersSampler(tiny_student_dir, dtype=torch.float32, device=CPU)
    check_versions(pair, tiny_student_dir, layout, prompts)
    engine.kill()
    engine.start()
    engine.wait()
    agree(pair, prompts)


def test_a_trained_tower_arrives(tiny_student_dir, layout, prompts):  # noqa: F811
    """Its weights travel with the language model's, and what engines keep of pictures is of the new ones."""
    (chunk,) = load_chunks(tiny_student_dir, layout, torch.float32, train=("language_model", "visual"))
    generator = torch.Generator().manual_seed(0)
    pair = open_pair(tiny_student_dir)
    before = agree(pair, prompts)
    scores = []
    for _ in range(2):
        with torch.no_grad():
            for name, parameter, _ in trained_rules(chunk):
                if name.startswith("visual."):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for sampler in pair:
            sampler.load_weights(export_weights([chunk]))
        after = agree(pair, prompts)
        assert after[:2] == before[:2], "texts are read as before"
        found = [sampler.score(prompts[2], RESPONSE) for sampler in pair]
        assert found[0] == pytest.approx(found[1], rel=0, abs=1e-4)
        scores.append(found[0])
    assert max(abs(a - b) for a, b in zip(*scores, strict=True)) > 1e-2, "the tower matters"
