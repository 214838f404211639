"""What waits in CPU memory: the same updates and gradients to the bit, checkpoints that go on with and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vision_ranks

from support import tiny
from support.steps import batch_of, make_groups, make_trainer
from vold.config.schema import AdapterConfig
from vold.data.packing import pack
from vold.objectives import Objective
from vold.objectives.advantages import group_normalised
from vold.trainer import offload
from vold.trainer.checkpoint import Checkpoints
from vold.trainer.optimizer import optimizer_state


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save(tiny.qwen3(), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def samples():
    return Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))


def state_of(trainer) -> dict[str, torch.Tensor]:
    values = {f"model/{name}": parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        fields = optimizer_state(trainer.optimizer, parameter)
        values |= {f"{field}/{name}": value.clone() for field, value in fields.items()}
    return values


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_the_same_and_a_checkpoint_goes_on_either_way(
    dtype, distributed, student, samples, layout, tmp_path
):
    layout = replace(layout, distributed_optimizer=distributed)
    open_trainer = lambda on: make_trainer(student, layout, dtype=dtype, offload=on, lr=0.01, weight_decay=0.1)  # noqa: E731
    trainers = {on: open_trainer(on) for on in (False, True)}
    for on, trainer in trainers.items():
        for _ in range(2):
            assert trainer.step(batch_of(samples)).metrics["skipped"] == 0.0
        Checkpoints(tmp_path / str(on), layout).save(trainer, 2)
    plain, offloaded = map(state_of, trainers.values())
    assert plain.keys() == offloaded.keys() and all(torch.equal(plain[name], offloaded[name]) for name in plain)
    trainers[False].step(batch_of(samples))
    expected = state_of(trainers[False])
    for saved, on in ((True, False), (False, True)):
        resumed = open_trainer(on)
        Checkpoints(tmp_path / str(saved), layout).load(resumed, 2)
        resumed.step(batch_of(samples))
        found = state_of(resumed)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_masters_on_the_device_have_no_memory(student, layout):
    trainer = make_trainer(student, layout, dtype=torch.bfloat16, offload=True)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    narrow = [p for p in parameters if p.numel() > 1]
    assert narrow and all(p.untyped_storage().nbytes() == 4 for p in narrow)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_offloaded_activations_give_the_same_gradients(recompute, adapter, student, samples, layout, monkeypatch):
    monkeypatch.setattr(offload.ActivationOffload.__init__, "__defaults__", (1,))  # the miniature's are small
    moved, pack_one = [], offload.ActivationOffload._pack
    monkeypatch.setattr(
        offload.ActivationOffload, "_pack", lambda self, x: moved.append(pack_one(self, x)) or moved[-1]
    )
    found = []
    for on in (False, True):
        chosen = replace(layout, recompute=recompute, offload_activations=on)
        trainer = make_trainer(student, chosen, adapter=adapter)
        trainer.accumulate_gradients(batch_of(samples, max_tokens=30))
        found.append({name: p.main_grad.clone() for name, p in trainer.parameters.items()})
        weights = {p.data_ptr() for chunk in trainer.chunks for p in chunk.parameters()}
    assert all(torch.equal(expected, found[1][name]) for name, expected in found[0].items())
    hosts = [one for one in moved if isinstance(one, tuple)]
    assert hosts and all(host.data_ptr() not in weights for host, *_ in hosts)
    assert any(isinstance(one, torch.Tensor) and one.data_ptr() in weights for one in moved)


def test_a_trained_tower_offloads_too(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(offload.ActivationOffload.__init__, "__defaults__", (1,))
    student = tiny.save(vision_ranks.reference("qwen3_vl"), tmp_path)
    trainer = vision_ranks.open_trainer(student, replace(layout, offload_activations=True), train=vision_ranks.TOWER)
    assert pack(vision_ranks.make_samples(), max_tokens=60, encode=vision_ranks.Pictures(trainer.chunks[0].arch))
    vision_ranks.check(trainer, "qwen3_vl", takes_tower=True)
