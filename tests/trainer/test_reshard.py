"""A run goes on at another tp x pp x cp x dp: the same state to the last bit, and the same next step."""

from __future__ import annotations

import json
from functools import partial

import pytest
import resharding
import torch

from support import ranks, tiny
from vold.config.schema import AdapterConfig
from vold.trainer.checkpoint import shard_files
from vold.trainer.shards import PieceReader

CHAIN = [  # world, layout; every change of tp, pp, vpp, dp and of the optimizer's division, up and down
    (2, dict(tp=2, sp=True)),
    (2, dict(pp=2, vpp=2)),
    (2, dict(distributed_optimizer=True)),
    (4, dict(tp=2, pp=2)),
    (4, dict(tp=2, distributed_optimizer=True)),
    (2, dict(cp=2, distributed_optimizer=True)),
    (1, dict()),
]
MIXTURE_CHAIN = [
    (2, dict(ep=2)),
    (4, dict(tp=2, sp=True, ep=2, etp=2, distributed_optimizer=True)),
    (2, dict(pp=2)),
]


def whole_tensors(path) -> dict[str, torch.Tensor]:
    """Every global tensor but the ranks' random states, put together."""
    with PieceReader(shard_files(path)) as reader:
        found = {}
        for name, pieces in reader._pieces.items():
            if not name.startswith("random/"):
                shape = [reader.size(name, dim) for dim in range(len(pieces[0][0]))]
                split = max(range(len(shape)), key=lambda dim: max(offsets[dim] for offsets, _ in pieces))
                found[name] = reader.read(name, shape, split)
    return found


@pytest.mark.parametrize(
    ("model", "dtype", "tolerance", "chain", "adapter"),
    [
        (tiny.qwen3, "float32", 1e-6, CHAIN, None),
        (partial(tiny.qwen3, tied=False), "bfloat16", 1e-2, CHAIN[2:], None),
        (tiny.qwen3, "bfloat16", 1e-2, CHAIN[::2], AdapterConfig(rank=3)),
        (tiny.qwen3_moe, "float32", 1e-6, MIXTURE_CHAIN, None),
    ],
)
def test_a_chain_of_layouts(model, dtype, tolerance, chain, adapter, tmp_path):
    student = tiny.save(model(num_hidden_layers=4), tmp_path / "student")
    run_dir = tmp_path / "run"
    for step, (world, layout) in enumerate(chain):
        ranks.run(world, resharding.link, student, layout, dtype, run_dir, step, adapter, logs=tmp_path / f"{step}")
    steps = [json.loads((run_dir / f"steps-{step}.json").read_text()) for step in range(len(chain))]
    for step in range(1, len(chain)):
        saved = whole_tensors(run_dir / f"checkpoints/step-{step:06d}")
        again = whole_tensors(run_dir / f"again-{step}/checkpoints/step-{step:06d}")
        assert saved.keys() == again.keys() and len(saved) > 100
        assert any(not torch.equal(saved[name], saved[name.replace("average/", "model/")]) for name in saved)
        assert all(torch.equal(saved[name], again[name]) for name in saved), f"{chain[step - 1]} -> {chain[step]}"
        before, after = steps[step - 1], steps[step]
        assert after["lr"][0] == before["lr"][1]
        assert after["nll"][0] == pytest.approx(before["nll"][1], rel=tolerance)
        assert before["kl_loss"][1] > 0
        assert after["kl_loss"][0] == pytest.approx(before["kl_loss"][1], rel=10 * tolerance)
        assert after["grad_norm"][0] == pytest.approx(before["grad_norm"][1], rel=10 * tolerance)
