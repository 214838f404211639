"""The share of a card that vLLM is told to use beside a trainer. tests/vllm/test_engine_memory_check.py asks vLLM."""

from __future__ import annotations

import shutil

import pytest
import torch

from vold.commands.serve import server_command
from vold.config.schema import VllmConfig
from vold.rollout.vllm.engines import CONTEXT_BYTES, GIB, engine_options, memory_share

H200 = 143771 << 20


@pytest.mark.parametrize("free_gib", [12.5, 40.0, 71.3, 130.0])
def test_what_is_left_after_the_context(free_gib):
    share = memory_share(int(free_gib * GIB), H200, 2 * GIB, VllmConfig())
    assert free_gib * GIB - CONTEXT_BYTES - 1e-4 * H200 <= share * H200 <= free_gib * GIB - CONTEXT_BYTES


@pytest.mark.parametrize("free_gib", [0.2, 5.0, 10.9])
def test_an_engine_that_does_not_fit_is_one_line(free_gib):
    line = r"vllm\.kv_cache_gib = 8 and weights of 2\.0 GiB do not fit: .* of 140\.4 GiB .* \(vold serve\)$"
    with pytest.raises(ValueError, match=line):
        memory_share(int(free_gib * GIB), H200, 2 * GIB, VllmConfig())


def test_policy_teacher_and_server_say_the_same(tmp_path, tiny_teacher_dir, monkeypatch):
    shutil.copy(tiny_teacher_dir / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, H200))
    share = engine_options(tmp_path, VllmConfig(), "bfloat16")["gpu_memory_utilization"]
    assert share == memory_share(60 * GIB, H200, 1000, VllmConfig())
    command = server_command(tmp_path, VllmConfig(), dtype="bfloat16", where={"host": "127.0.0.1", "port": 1})
    assert command[command.index("--gpu-memory-utilization") + 1] == str(share)


def test_a_cpu_engine_is_told_nothing(tiny_teacher_dir):
    assert "gpu_memory_utilization" not in engine_options(tiny_teacher_dir, VllmConfig(), "float32")
