"""Planned memory beside what a step really holds: every tensor that is alive, counted while training steps run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vold.planning.meta_memory import LiveBytes, head_bytes, packed_on_meta
from vold_kernels import head
from vold_kernels.chunks import default_budget
from vold_kernels.lanes import CudaLanes
from vold_kernels.waves import HeadShape

PROGRAM = Path(__file__).with_name("memory_ranks.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_plan_is_within_a_tenth_of_measured_peaks(processes, launch, tmp_path, monkeypatch):
    run = launch(processes, PROGRAM, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [line.split(",") for line in run.stdout.splitlines() if line.count(",") == 3]
    assert len(rows) == (15 + bool(find_spec("bitsandbytes")) if processes == 1 else 10), run.stdout
    for case, rank, measured, planned in rows:
        assert float(planned) == pytest.approx(float(measured), rel=0.1), f"{case}, rank {rank}"


def test_live_bytes_counts_storages_once_and_lets_go_of_them():
    before = torch.ones(1000)
    with LiveBytes() as live:
        view, changed = before[:500], before.add_(1.0)
        assert live.now == 0, "a view and a write in place are no new memory"
        made = before * 2
        assert live.now == 4000
        half = made[:10]
        del made
        assert live.now == 4000, "a view keeps its storage"
        del half
        assert live.now == 0 and live.peak == 4000
        torch.empty(250, device="meta")
        assert live.now == 0 and live.peak == 4000
    assert len(view) == 500 and changed is before


def test_a_packing_on_meta_is_full_and_reads_a_prompt_once():
    tokens, losses = packed_on_meta(2 * (32 + 4 * 95) + 10, prompt=32, response=96, responses=4)
    assert tokens.input_ids_T.shape == (834,) and int(tokens.cu_seqlens[-1]) == 834
    assert tokens.cu_seqlens.diff().tolist() == [127, 95, 95, 95, 127, 95, 95, 95, 10]
    assert tokens.cu_seqlens_k.diff().tolist() == [127, 127, 127, 127, 127, 127, 127, 127, 10]
    assert len(tokens.kv_index_K) == 8 * 127 + 10 and losses == 8 * 96, "the last prompt is cut off before its end"


def test_a_head_holds_one_budget_of_logits_whatever_the_number_of_tokens():
    for tokens in (1000, 8192, 16384, 131072):
        chunk = head_bytes(HeadShape(tokens, 2048, 151936), torch.bfloat16, "cuda") - tokens * 2048 * (2 + 4)
        assert 0 < chunk <= 5 * 2**30 + 8835 * 2048 * 2, "5 GiB of logits and their hidden states"
    assert chunk > 5 * 2**30


@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_planned_logits_are_those_that_the_head_would_hold_on_an_h200(tp, two_heads, monkeypatch):
    """linear_policy_loss has two chunks of one head, linear_kl one of each of two; ranks that share a head halve it."""
    monkeypatch.setattr(head, "processors", lambda device: 132)
    monkeypatch.setattr(head, "free_bytes", lambda device: 100 * 2**30)
    monkeypatch.setattr(head, "lanes_of", lambda device, overlap: SimpleNamespace(buffers=CudaLanes.buffers))
    rows, tokens = 151936 // tp, 32768
    weight_UD = torch.empty(rows, 2048, dtype=torch.bfloat16, device="meta")
    shard = SimpleNamespace(rows=rows, sizes_R=torch.full((tp,), rows))
    one = head.Head(weight_UD, shard, 1.0, default_budget(torch.device("cuda")))
    if two_heads:
        held = one.resident_tokens(2 * rows, tokens, buffers=1) * 2 * rows * 4
    else:
        held = one.resident_tokens(rows, tokens) * CudaLanes.buffers * rows * 4
    shape = HeadShape(tokens, 2048, rows)
    planned = head_bytes(shape, torch.bfloat16, "cuda", ranks=tp, two_heads=two_heads) - tokens * 2048 * (2 + 4)
    assert held <= planned <= 1.25 * held
