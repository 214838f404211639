"""Requests to vLLM and answers from it, and the engine inside the training process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.data.pictures import read_picture
from vold.models.tokenizer import load_tokenizer
from vold.parallel import cpu

WORKER = "vold.rollout.vllm_worker.PolicyWorker"


@dataclass(frozen=True)
class Request:
    """`token_ids` with one image-pad id per image, which vLLM expands; `params`: fields of vLLM's SamplingParams."""

    token_ids: Sequence[int]
    images: Sequence[Path]
    params: dict[str, Any]


@dataclass(frozen=True)
class Response:
    """Sampled ids, a stop token included, and the log-probability (nats) of each at the request's temperature."""

    ids: list[int]
    logps: list[float]


@dataclass(frozen=True)
class Answer:
    """`prompt_logps`: of every prompt token but the first (images expanded), at temperature 1, where asked for."""

    responses: list[Response]
    prompt_logps: list[float]


class Engines(Protocol):
    """One engine or several with the same weights."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each, in order."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Sampler.load_weights; no cache holds anything of the old weights afterwards."""
        ...


def engine_options(checkpoint: Path, settings: VllmConfig, dtype: str) -> dict[str, Any]:
    """vLLM's engine arguments, wherever the engine runs."""
    return {
        "model": str(checkpoint),
        "dtype": dtype,
        "max_model_len": settings.max_model_len,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        "enforce_eager": settings.enforce_eager,
        # vLLM 0.32 rewinds a seeded request's generator after each part of a prompt but the last: CPUs have no rewind.
        "enable_chunked_prefill": None if torch.cuda.is_available() else False,
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"video": 0},
        "worker_extension_cls": WORKER,
    }


class ColocatedEngine:
    """vLLM in this process, on the device the rank trains on. Weights are handed over as live tensors."""

    def __init__(self, checkpoint: Path, settings: VllmConfig, *, dtype: torch.dtype):
        _own_environment()
        with cpu.paused(), torch.random.fork_rng():  # vLLM seeds torch
            try:
                from vllm import LLM
            except ImportError as error:
                raise ValueError(f"engine = 'vllm' needs vLLM here: pip install 'vold[vllm]' ({error})") from None
            self._llm = LLM(
                **engine_options(checkpoint, settings, str(dtype).removeprefix("torch.")),
                # Several ranks: each has an engine of its own in the trainer's process group.
                distributed_executor_backend="external_launcher" if _world_size() > 1 else None,
                disable_log_stats=True,
            )
            # Its clean-up destroys every process group of the process, the trainer's too.
            self._llm.llm_engine.engine_core._finalizer.detach()
            self._llm.collective_rpc("prepare_policy", args=(len(load_tokenizer(checkpoint)),))

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """See Engines."""
        from vllm import SamplingParams

        with cpu.paused():
            params = [SamplingParams(**request.params, detokenize=False) for request in requests]
            outputs = self._llm.generate([_prompt(request) for request in requests], params, use_tqdm=False)
        return [_answer(output) for output in outputs]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Engines."""
        self._llm.collective_rpc("load_policy", args=(named_weights,))
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache over a weight update: requests are still running")


def _own_environment() -> None:
    """What vLLM reads from the environment, unless the person has chosen otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # live tensors cannot cross to another process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # see PolicyWorker.prepare_policy
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are not vLLM's to place
    }.items():
        os.environ.setdefault(name, value)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _prompt(request: Request) -> dict:
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
    if request.images:
        prompt["multi_modal_data"] = {"image": [read_picture(path) for path in request.images]}
    return prompt


def _answer(output) -> Answer:
    """From vLLM's RequestOutput: a dict of log-probs per token, that of the token itself among them."""
    responses = [
        Response(
            list(choice.token_ids),
            [step[token].logprob for step, token in zip(choice.logprobs or [], choice.token_ids, strict=False)],
        )
        for choice in output.outputs
    ]
    steps = zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
    return Answer(responses, [step[token].logprob for step, token in steps if step is not None])
