"""The engine that a config names."""

from __future__ import annotations

import sys

import pytest
import torch

from vold.config.schema import EngineConfig
from vold.rollout import TransformersSampler, open_sampler


def test_transformers_is_the_default(tiny_student_dir):
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert isinstance(open_sampler(EngineConfig(), tiny_student_dir, **where), TransformersSampler)


def test_without_vllm_it_is_one_line(tiny_student_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"engine = 'vllm' needs vLLM here: pip install"):
        open_sampler(EngineConfig(engine="vllm"), tiny_student_dir, dtype=torch.float32, device=torch.device("cpu"))
