"""The rollout benchmark measures what it says: both providers draw the same tokens on one engine."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="vLLM has an environment of its own: make test-vllm")

from benchmarks import rollout
from benchmarks.harness import read_rows

pytestmark = pytest.mark.vllm


def test_a_row_for_each_provider(tmp_path):
    size = ["--prompts", "3", "--responses", "2", "--new-tokens", "8", "--runs", "2", "--kv-cache-gib", "0.25"]
    rollout.main([*size, "--out", str(tmp_path)])
    ours, direct = read_rows(tmp_path / "rollout-cpu.csv")
    assert tuple(ours) == rollout.COLUMNS
    assert (ours["provider"], direct["provider"]) == (rollout.OURS, rollout.DIRECT)
    assert 6 <= int(ours["drawn_tokens"]) <= 48 and ours["drawn_tokens"] == direct["drawn_tokens"]
    assert float(ours["median_s"]) > 0 and float(direct["over_direct"]) == 1.0
