"""LoRA's dropout: the same masks on every layout and when a layer is computed again, none where the model is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from support import ranks, tiny
from support.steps import batch_of, make_groups, make_trainer, relative
from vold.config.schema import AdapterConfig
from vold.models.adapter_dropout import Dropout, Share
from vold.models.weights import export_adapters
from vold.objectives import Objective
from vold.objectives.advantages import group_normalised
from vold.parallel.launch import initialise, shutdown

ADAPTER = AdapterConfig(rank=2, dropout=0.4, seed=3)
LAYOUTS = [dict(tp=2), dict(tp=2, sp=True), dict(cp=2), dict(pp=2), dict(pp=2, vpp=2, recompute="full")]


def gradients(trainer, samples) -> dict[str, torch.Tensor]:
    """Whole and by peft's names; B is not zero, so that A has a gradient too."""
    with torch.no_grad():
        for chunk in trainer.chunks:
            for name, parameter in chunk.named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.05)
    trainer.accumulate_gradients(batch_of(samples, max_tokens=30))
    return {name: tensor.clone() for name, tensor in export_adapters(trainer.chunks, lambda p: p.main_grad)}


def samples():
    return Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))


def layouts(student, out) -> None:
    for number, sizes in enumerate(LAYOUTS):
        found = gradients(make_trainer(student, initialise(**sizes, seed=number), adapter=ADAPTER), samples())
        if dist.get_rank() == 0:
            torch.save(found, out / str(number))
    shutdown()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save(tiny.qwen3(num_hidden_layers=4), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def expected(student, layout):
    return gradients(make_trainer(student, layout, adapter=ADAPTER), samples())


def test_every_layout_drops_the_same(student, expected, tmp_path):
    ranks.run(2, layouts, student, tmp_path, logs=tmp_path / "logs")
    for number, sizes in enumerate(LAYOUTS):
        found = torch.load(tmp_path / str(number), weights_only=True)
        assert relative(found, expected) <= 1e-4, sizes  # other masks: over 0.1


@pytest.mark.parametrize("recompute", ["selective", "swiglu", "full"])
def test_a_layer_that_is_computed_again_drops_the_same(recompute, student, expected, layout):
    found = gradients(make_trainer(student, replace(layout, recompute=recompute), adapter=ADAPTER), samples())
    assert relative(found, expected) <= 1e-5


def test_a_run_again_draws_the_same_and_each_update_others(student, expected, layout):
    trainer = make_trainer(student, layout, adapter=ADAPTER)
    assert relative(gradients(trainer, samples()), expected) == 0.0
    for numbers in ((1, 0, 0), (1, 1, 0), (1, 0, 1)):
        trainer.chunks[0].dropout.begin_update(*numbers)
        assert relative(gradients(trainer, samples()), expected) > 0.1
    other = make_trainer(student, layout, adapter=ADAPTER.model_copy(update={"seed": 4}))
    for ours, theirs in zip(other.chunks[0].parameters(), trainer.chunks[0].parameters(), strict=True):
        ours.data.copy_(theirs.data)
    assert relative(gradients(other, samples()), expected) > 0.1


def test_where_the_model_is_read_nothing_is_dropped(student, layout):
    dropping = make_trainer(student, layout, adapter=ADAPTER)
    plain = make_trainer(student, layout, adapter=ADAPTER.model_copy(update={"dropout": 0.0}))
    reference = gradients(plain, samples())
    assert relative(gradients(dropping, samples()), reference) > 0.1
    assert dropping.logprobs(batch_of(samples())) == plain.logprobs(batch_of(samples()))


def test_the_update_is_that_of_the_masked_inputs_on_average_that_of_all():
    """Against peft's own formula, B A dropout(x), with the mask read off the output of ones."""
    dropout, x, A = Dropout(0.3, seed=0), torch.randn(50, 1, 40), torch.randn(2, 40)
    dropout.begin_update(1)
    means = []
    for _ in range(200):
        with dropout.forward_pass(training=True):
            mask = dropout.linear(torch.ones(50, 1, 40), torch.eye(40), "name", Share(), Share())
            low = dropout.linear(x, A, "name", Share(), Share())
            other = dropout.linear(torch.ones(50, 1, 40), torch.eye(40), "other", Share(), Share())
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7]) and not torch.equal(mask, other)
        torch.testing.assert_close(low, (x * mask) @ A.T)
        means.append(mask)
    stacked = torch.stack(means)
    assert float((stacked == 0).float().mean()) == pytest.approx(0.3, abs=0.002)  # 400,000 draws: 3 standard errors
    assert float(stacked.mean(0).std()) == pytest.approx((0.3 / 0.7 / 200) ** 0.5, rel=0.05), "passes are independent"
