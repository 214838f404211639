"""The sampler of the engine that a config names."""

from __future__ import annotations

from pathlib import Path

import torch

from vold.config.schema import AdapterConfig, EngineConfig
from vold.rollout.sampler import Sampler
from vold.rollout.transformers.sampler import TransformersSampler
from vold.rollout.vllm.adapters import EngineAdapter
from vold.rollout.vllm.engines import ColocatedEngine
from vold.rollout.vllm.remote import RemoteEngines
from vold.rollout.vllm.sampler import VllmSampler


def open_sampler(
    config: EngineConfig,
    checkpoint: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: AdapterConfig | None = None,
    keep_requests: bool = False,
) -> Sampler:
    """Open a sampler with the checkpoint's weights. vLLM is imported only where the config names it. adapter: of a
    policy that comes as adapters (vLLM alone). keep_requests: other threads sample while weights are loaded."""
    if config.engine == "transformers":
        return TransformersSampler(checkpoint, dtype=dtype, device=device)
    policy = EngineAdapter(adapter, checkpoint) if adapter else None
    if config.vllm.urls:
        return VllmSampler(
            checkpoint, RemoteEngines(checkpoint, config.vllm, adapter=policy, keep_requests=keep_requests)
        )
    return VllmSampler(checkpoint, ColocatedEngine(checkpoint, config.vllm, dtype=dtype, adapter=policy))
