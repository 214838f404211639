"""`parallel.deterministic` reaches flash-attn, and leaves torch as it was without it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from vold.models.layer_ops import flash_attention
from vold.parallel import launch


@pytest.mark.parametrize("deterministic", [True, False])
def test_it_reaches_flash_attn(deterministic, monkeypatch):
    asked = {}
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda *args, **options: asked.update(options)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        launch._fix_order_of_sums(deterministic)
        x, bounds = torch.zeros(2, 1, 8), torch.tensor([0, 2], dtype=torch.int32)
        flash_attention(x, x, x, PackedSeqParams("thd", bounds, bounds, max_seqlen_q=2, max_seqlen_kv=2), 1.0)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert asked["deterministic"] is deterministic and asked["causal"]


def test_a_cpu_run_is_untouched(layout):
    launch.initialise(1, 1, seed=0, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
