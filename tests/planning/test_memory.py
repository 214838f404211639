"""Planned memory beside what a step really holds: every tensor that is alive, counted while training steps run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vold.planning.meta_memory import LiveBytes, head_bytes, packed_on_meta

PROGRAM = Path(__file__).with_name("memory_ranks.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_plan_is_within_a_tenth_of_measured_peaks(processes, torchrun, tmp_path, monkeypatch):
    run = torchrun(processes, PROGRAM, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [line.split(",") for line in run.stdout.splitlines() if line.count(",") == 3]
    assert len(rows) == (6 if processes == 1 else 10), run.stdout
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
        chunk = head_bytes(tokens, 151936, 2048, torch.bfloat16, "cuda") - tokens * 2048 * (2 + 4)
        assert 0 < chunk <= 5 * 2**30 + 8192 * 2048 * 2, "5 GiB of logits and their hidden states"
    assert chunk > 5 * 2**30
