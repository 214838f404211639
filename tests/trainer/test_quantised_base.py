"""Frozen weights in 8 and 4 bits: the model is exactly that of the weights as they are put together again.

With bitsandbytes where it is installed; else with a stand-in that rounds to halves."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from support import ranks, tiny
from support.steps import batch_of, make_groups, make_trainer, relative
from vold.config.schema import AdapterConfig
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.quantised import BYTES, decoder_linears
from vold.models.student import load_chunks
from vold.models.weights import export_adapters, export_weights
from vold.objectives import Objective
from vold.objectives.advantages import group_normalised
from vold.parallel.launch import initialise, shutdown
from vold.teacher import BaseTeacher

LAYOUTS = [dict(tp=2), dict(tp=2, sp=True, recompute="full")]
ADAPTER = AdapterConfig(rank=2)


def stand_in() -> None:
    """Functions of the same arguments and results, where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        pack = lambda weight, **_options: (weight.half().flatten(), weight.dtype)  # noqa: E731
        unpack = lambda packed, dtype: packed.to(dtype)  # noqa: E731
        names = ("quantize_4bit", "quantize_blockwise"), ("dequantize_4bit", "dequantize_blockwise")
        functions = dict.fromkeys(names[0], pack) | dict.fromkeys(names[1], unpack)
        sys.modules["bitsandbytes"] = SimpleNamespace(functional=SimpleNamespace(**functions))
        sys.modules["bitsandbytes.functional"] = sys.modules["bitsandbytes"].functional


@pytest.fixture(autouse=True)
def functions(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))  # put back afterwards
        if sys.modules[name] is None:
            del sys.modules[name]
    stand_in()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save(tiny.qwen2(num_hidden_layers=2), tmp_path_factory.mktemp("student"))


def samples():
    return Objective(group_normalised, beta=0.0).assign_token_weights(make_groups([[1.0, 0.0], [0.0, 1.0]]))


def gradients(trainer) -> dict[str, torch.Tensor]:
    trainer.accumulate_gradients(batch_of(samples()))
    return {name: tensor.clone() for name, tensor in export_adapters(trainer.chunks, lambda p: p.main_grad)}


def compare(student, layout, bits: int, folder) -> None:
    """A plain base of the weights that the quantised ones are has the same gradients, log-probs and merged weights."""
    trainer = make_trainer(student, layout, adapter=ADAPTER.model_copy(update={"base_bits": bits}), lr=0.05)
    assert all(linear.weight.untyped_storage().nbytes() <= 4 for linear in decoder_linears(trainer.chunks[0]))
    weights = {name: tensor.clone() for name, tensor in export_weights(trainer.chunks)}
    if torch.distributed.get_rank() == 0:
        export_checkpoint(student, folder, iter(weights.items()))
    torch.distributed.barrier()
    plain = make_trainer(folder, layout, adapter=ADAPTER, lr=0.05)
    for _ in range(2):
        assert relative(gradients(trainer), gradients(plain)) <= 1e-6
        assert trainer.step(batch_of(samples())).metrics["skipped"] == 0.0
        plain.step(batch_of(samples()))
    for (name, ours), (_, theirs) in zip(export_weights(trainer.chunks), export_weights(plain.chunks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)
    found, expected = trainer.logprobs(batch_of(samples())), plain.logprobs(batch_of(samples()))
    assert all(found[n] == pytest.approx(expected[n], abs=1e-5) for n in expected)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("bits", [8, 4])
def test_one_process(bits, recompute, student, layout, tmp_path):
    compare(student, replace(layout, recompute=recompute), bits, tmp_path / "plain")


def layouts(student, folder) -> None:
    stand_in()
    for number, sizes in enumerate(LAYOUTS):
        compare(student, initialise(**sizes, seed=0), 4, folder / str(number))
    shutdown()


def test_tensor_parallel(student, tmp_path):
    ranks.run(2, layouts, student, tmp_path, logs=tmp_path / "logs")


def test_a_base_teacher_and_a_self_teacher_read_the_same_weights(student, layout):
    adapter = ADAPTER.model_copy(update={"base_bits": 4})
    trainer = make_trainer(student, layout, adapter=adapter)
    settings = {"dtype": torch.float32, "vocab_size": 40}
    (scored,) = (
        BaseTeacher(trainer, student, layout, **settings)
        .score(batch_of([replace(sample, kl_weight=1.0) for sample in samples()]))
        .micro_batches
    )
    expected = trainer.logprobs(batch_of(samples()))  # B is zero yet
    for sequence, sample in enumerate(scored.sample_B):
        assert scored.logp_teacher_N[scored.sequence_N == sequence].tolist() == expected[sample]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_and_rounding_of_bitsandbytes(bits, layout):
    """As many bytes as are planned, and errors of the size that 8-bit blocks and NF4 have."""
    from vold.models.quantised import QuantisedWeight

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = QuantisedWeight(weight, bits)
    state = packed._state
    scales = [state.absmax, *([state.state2.absmax] if bits == 4 else [])]
    found = packed._packed.nbytes + sum(scale.nbytes for scale in scales)
    assert found == pytest.approx(weight.numel() * BYTES[bits], rel=0.002)
    error = (packed.whole().float() - weight.float()).norm() / weight.float().norm()
    assert error < {8: 0.02, 4: 0.1}[bits] and packed.whole().dtype == torch.bfloat16


def test_without_bitsandbytes_it_is_refused_in_one_line(student, layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"adapter.base_bits needs bitsandbytes: pip install bitsandbytes"):
        load_chunks(student, layout, torch.float32, adapter=ADAPTER.model_copy(update={"base_bits": 8}))
