"""Requests to vLLM and its outputs, and the engine inside the training process."""

from __future__ import annotations

import difflib
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from vold.config.schema import VllmConfig
from vold.data.pictures import picture_size, read_picture
from vold.models.architecture import SUPPORTED_MODEL_TYPES
from vold.models.images import ImageProcessor
from vold.models.served import ServedModel
from vold.models.tokenizer import id_bound, load_tokenizer
from vold.parallel import cpu
from vold.rollout.vllm import hidden_states, weight_files
from vold.rollout.vllm.adapters import EngineAdapter
from vold.rollout.vllm.recurrent import recurrent_options
from vold.run import leftovers
from vold.types import Prompt, TokenIds

GIB = 2**30
CONTEXT_BYTES = GIB  # an engine's CUDA context and communicators, which vLLM opens before it looks at free memory
WORKER = "vold.rollout.vllm.worker.PolicyWorker"


class SizedImage(NamedTuple):
    """An image file, and the (width, height) at which the model reads it. vLLM gets pixels of that size: its own resize
    differs from the trainer's by up to 18 of 255 in a pixel, and .2 nats in a log-prob."""

    path: Path
    size: tuple[int, int]

    def read(self) -> Image.Image:
        """The pixels that the trainer reads too."""
        return read_picture(self.path, self.size)


class StoredSizes:
    """The sizes of images as they are in their files, for a model whose processor vold does not know: vLLM resizes."""

    def size(self, path: Path) -> tuple[int, int]:
        """(width, height)"""
        return picture_size(path)


Sizes = ImageProcessor | StoredSizes


def load_sizes(checkpoint: Path) -> Sizes | None:
    """The sizes at which the model in a checkpoint directory, of any architecture, gets its images; None where it reads
    text only."""
    model = ServedModel.from_pretrained(checkpoint)
    if not model.sees:
        return None
    return ImageProcessor(checkpoint) if model.config.model_type in SUPPORTED_MODEL_TYPES else StoredSizes()


def sized_images(prompt: Prompt, processor: Sizes | None) -> tuple[SizedImage, ...]:
    """A prompt's images as the model with this processor reads them; a text model has none."""
    return tuple(SizedImage(path, processor.size(path)) for path in prompt.images) if processor else ()


@dataclass(frozen=True)
class Request:
    """One prompt with everything that is sampled or scored for it.

    token_ids  with one image-pad id per image, which vLLM expands
    params     fields of vLLM's SamplingParams
    scored     how many of the last ids get a log-probability, see `scoring`, or a hidden state, see `reading`
    """

    token_ids: list[int]
    images: Sequence[SizedImage]
    params: dict[str, Any]
    scored: int = 0

    @classmethod
    def scoring(cls, prompt: Prompt, response_ids: TokenIds | Sequence[int], processor: Sizes | None) -> Request:
        """A request for the log-probabilities of a given response. vLLM samples at least one token more."""
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        ids = [*prompt.token_ids.tolist(), *map(int, response_ids)]
        return cls(ids, sized_images(prompt, processor), params, scored=len(response_ids))

    @classmethod
    def reading(cls, prompt: Prompt, response_ids: TokenIds | Sequence[int], processor: Sizes | None) -> Request:
        """A request for the hidden states that predict the tokens of a given response. Positions from vLLM's prefix
        cache would have none."""
        scored = cls.scoring(prompt, response_ids, processor)
        asked = {hidden_states.ASK: [secrets.token_hex(8), scored.scored]}
        params = {"max_tokens": 1, "temperature": 0.0, "skip_reading_prefix_cache": True, "extra_args": asked}
        return replace(scored, params=params, scored=0)


@dataclass(frozen=True)
class Response:
    """Sampled ids, a stop token included, and the log-probability (nats) of each at the request's temperature.
    versions: of the weights that each was sampled with, where the engine says so."""

    ids: list[int]
    logps: list[float]
    versions: list[int] | None = None


@dataclass(frozen=True)
class EngineOutput:
    """The output for one request.

    scored     log-probabilities (nats) of its last ids, at the engine's temperature
    hidden_nE  the hidden states that predict its last ids, on the CPU, where it asked for them
    top        ids and log-probs [n, k] of the most probable ids in the place of each, where the engine gives them
    """

    responses: list[Response]
    scored: list[float]
    hidden_nE: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None


class Engines(Protocol):
    """One engine or several with the same weights."""

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, EngineOutput | None]]:
        """(index, output) of each request, in the order they finish. None: it failed too often while engines answered
        others; warnings name the reason. When the iterator is closed early, requests under way are cancelled."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Sampler.load_weights. Afterwards no cache depends on the old weights, nor do tokens of requests that
        went on meanwhile."""
        ...


def engine_options(
    checkpoint: Path, settings: VllmConfig, dtype: str, adapter: EngineAdapter | None = None
) -> dict[str, Any]:
    """vLLM's engine arguments, the same for the policy and a teacher, inside this process and behind `vold serve`;
    with `adapter`, of an engine that gets its policy as adapters. Raises ValueError where the GPU has not the memory
    for the engine now, or vLLM cannot run the model on this machine."""
    return {
        **_memory_options(checkpoint, settings),
        "model": str(checkpoint),
        "dtype": dtype,
        "max_model_len": settings.max_model_len,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        "enforce_eager": settings.enforce_eager,
        # vLLM 0.32 rewinds a seeded request's generator after each part of a prompt but the last; CPUs cannot.
        "enable_chunked_prefill": None if torch.cuda.is_available() else False,
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"video": 0},
        "worker_extension_cls": WORKER,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        **recurrent_options(checkpoint, dtype),
        **(adapter.options if adapter else {}),
        **checked_options(settings.engine_options),
    }


def checked_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The user's further engine arguments. Raises ValueError for one that this machine's vLLM does not have."""
    with suppress(ImportError):
        from vllm.engine.arg_utils import EngineArgs

        known = {field.name for field in fields(EngineArgs)}
        if unknown := sorted(options.keys() - known):
            near = difflib.get_close_matches(unknown[0], known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"vllm.engine_options.{unknown[0]} is no engine argument of this vLLM{meant}")
    return options


def _memory_options(checkpoint: Path, settings: VllmConfig) -> dict[str, float]:
    """vLLM refuses to start unless so much of the card is free, .92 by default, even where `kv_cache_memory_bytes`
    says what it is to take. Trainer and teacher are there first, so it is told what they left."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.empty_cache()  # memory that the trainer has freed and torch still caches
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) // settings.gpus
    return {"gpu_memory_utilization": memory_share(*torch.cuda.mem_get_info(), weights, settings)}


def memory_share(free: int, total: int, weights: int, settings: VllmConfig) -> float:
    """The share of a card of `total` bytes, of which `free` are free, that an engine with weights of so many bytes may
    use: all that is free but for what its CUDA context and communicators take before it looks. Raises ValueError where
    weights, keys and values do not fit."""
    share = math.floor((free - CONTEXT_BYTES) / total * 1e4) / 1e4
    needed = weights + settings.kv_cache_gib * GIB
    if share * total < needed:
        raise ValueError(
            f"vllm.kv_cache_gib = {settings.kv_cache_gib:g} and weights of {weights / GIB:.1f} GiB do not fit: "
            f"{max(free - CONTEXT_BYTES, 0) / GIB:.1f} of {total / GIB:.1f} GiB of GPU memory are free for the engine; "
            "lower it, or give the engine a card of its own (vold serve)"
        )
    return share


def settings_for_scoring(checkpoint: Path, settings: VllmConfig) -> VllmConfig:
    """A teacher's settings, with max_model_len one token longer: vLLM refuses a prompt that leaves no space for a
    sampled token, and a response of full length could not be scored."""
    text = ServedModel.from_pretrained(checkpoint).config.get_text_config()
    limit = getattr(text, "max_position_embeddings", math.inf)
    if settings.max_model_len is None or settings.max_model_len >= limit:
        return settings
    return settings.model_copy(update={"max_model_len": settings.max_model_len + 1})


class ColocatedEngine:
    """vLLM in this process, on the device the rank trains on. Weights are synced as live tensors, or with `adapter` as
    adapters in files.

    With `settings.sleep` it frees its GPU memory after each call, moving weights to host memory, and takes it again
    when needed. Not vLLM's level 2, which discards the weights: a frozen vision tower is never sent again.
    """

    def __init__(
        self,
        checkpoint: Path,
        settings: VllmConfig,
        *,
        dtype: torch.dtype,
        temperature: float = 1.0,
        adapter: EngineAdapter | None = None,
    ):
        if settings.sleep and not torch.cuda.is_available():
            raise ValueError("vllm.sleep = true needs a GPU: vLLM cannot sleep on a CPU; leave it out")
        if settings.gpus > 1 and _world_size() > 1:
            raise ValueError(
                f"vllm.tensor_parallel_size × pipeline_parallel_size = {settings.gpus} inside each of {_world_size()} "
                "processes; start such engines with `vold serve` and name them in vllm.urls"
            )
        self._settings, self._adapter = settings, adapter
        self._files: tempfile.TemporaryDirectory | None = None  # of the adapter in use
        self._version: Any = None  # vLLM's LoRARequest of it
        _set_environment()
        with cpu.paused(), torch.random.fork_rng():  # vLLM seeds torch
            try:
                from vllm import LLM
            except ImportError as error:
                raise ValueError(
                    f"engine = 'vllm' needs vLLM here: pip install -c constraints-vllm.txt -e '.[vllm]' ({error})"
                ) from None
            self._llm = LLM(
                **engine_options(checkpoint, settings, str(dtype).removeprefix("torch."), adapter),
                # Several ranks: each has its own engine in the trainer's process group.
                distributed_executor_backend="external_launcher" if _world_size() > 1 else None,
                disable_log_stats=True,
                enable_sleep_mode=settings.sleep,
            )
            # Its clean-up destroys every process group of the process, the trainer's too.
            self._llm.llm_engine.engine_core._finalizer.detach()
            self._llm.collective_rpc("prepare_policy", args=(id_bound(load_tokenizer(checkpoint)), temperature))
        self._may_sleep = settings.sleep
        self._asleep: list[str] = []  # vLLM's tags of memory that is not on the GPU
        self._sleep()

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, EngineOutput | None]]:
        """See Engines. None for scores that are no numbers: any other failure here fails the process."""
        from vllm import SamplingParams

        self._wake("weights", "kv_cache")
        with cpu.paused():
            params = [SamplingParams(**request.params, detokenize=False) for request in requests]
            prompts = [vllm_prompt(request) for request in requests]
            computed_with = {"lora_request": self._version} if self._version else {}
            names = self._llm.enqueue(prompts, params, use_tqdm=False, **computed_with)
        engine, waiting = self._llm.llm_engine, {_output_name(name): index for index, name in enumerate(names)}
        try:
            while waiting:
                with cpu.paused():
                    finished = [output for output in engine.step() if output.finished]
                for output in finished:
                    index = waiting.pop(output.request_id)
                    yield index, self._output(output, requests[index])
        finally:
            if waiting:
                engine.abort_request(list(waiting))
            self._sleep()

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See Engines. The KV cache stays off the GPU until something is sampled with the new weights."""
        self._wake("weights")
        if self._adapter is not None:
            self._replace_adapter(self._adapter, named_weights, version)
        elif self._settings.gpus == 1:
            self._llm.collective_rpc("load_policy", args=(named_weights,))
        else:  # its workers are processes
            with self._new_folder() as folder:
                leftovers.sign(Path(folder))
                weight_files.write_parts(named_weights, Path(folder))
                self._llm.collective_rpc("load_policy", args=(folder,))
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache over a weight update: requests are still running")

    def _new_folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(dir=self._settings.weights_dir, prefix=leftovers.weights_prefix())

    def _replace_adapter(
        self, adapter: EngineAdapter, named_weights: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Requests from now on are computed with this version, which the engine has read; the one before is gone."""
        from vllm.lora.request import LoRARequest

        files, previous, previous_files = self._new_folder(), self._version, self._files
        leftovers.sign(Path(files.name))
        path = adapter.write(named_weights, Path(files.name))
        self._version, self._files = LoRARequest(f"policy-{version}", version, str(path)), files
        with cpu.paused():
            if not self._llm.llm_engine.add_lora(self._version):
                raise RuntimeError(f"vLLM took no adapter of version {version}: it has one of that number")
            if previous is not None:
                self._llm.llm_engine.remove_lora(previous.lora_int_id)
        if previous_files:
            previous_files.cleanup()

    def _output(self, output, request: Request) -> EngineOutput | None:
        found = _engine_output(output, request)
        if asked := hidden_states.asked_for(request.params):
            states = self._llm.collective_rpc("take_hidden_states", args=(asked[0],))
            found = replace(found, hidden_nE=next((rows_nE for rows_nE in states if rows_nE is not None), None))
            finite = found.hidden_nE is not None and bool(found.hidden_nE.isfinite().all())
        else:
            finite = all(map(math.isfinite, found.scored))
        return found if finite else None

    def _sleep(self) -> None:
        if self._may_sleep:
            self._llm.sleep(level=1)
            self._asleep = ["weights", "kv_cache"]

    def _wake(self, *needed: str) -> None:
        missing = [tag for tag in self._asleep if tag in needed]
        if missing:
            torch.cuda.empty_cache()  # memory that the trainer has freed and torch still caches
            self._llm.wake_up(tags=missing)
            self._asleep = [tag for tag in self._asleep if tag not in missing]


def _set_environment() -> None:
    """Environment variables that vLLM reads; those that are a matter of taste stay as the user set them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # live tensors cannot cross to another process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # see PolicyWorker.prepare_policy
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM would bind the trainer's threads to cores
    }.items():
        os.environ.setdefault(name, value)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def vllm_prompt(request: Request) -> dict:
    """A request as `LLM.generate` takes it."""
    prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
    if request.images:
        prompt["multi_modal_data"] = {"image": [image.read() for image in request.images]}
    return prompt


def _output_name(request_id: str) -> str:
    """The name of a request's output: vLLM adds a random ending to the name of the request itself."""
    return request_id.rpartition("-")[0]


def _engine_output(output, request: Request) -> EngineOutput:
    """From vLLM's RequestOutput, which has a dict of log-probs per token that includes the token itself."""
    responses = [
        Response(
            list(choice.token_ids),
            [step[token].logprob for step, token in zip(choice.logprobs or [], choice.token_ids, strict=False)],
        )
        for choice in output.outputs
    ]
    steps = [{token: entry.logprob for token, entry in (step or {}).items()} for step in output.prompt_logprobs or []]
    return EngineOutput(responses, scored_logps(request, steps))


def scored_logps(request: Request, steps: Sequence[dict[int, float]]) -> list[float]:
    """Log-probs of the request's last `scored` ids, from vLLM's {token id: log-prob} for each position of the prompt,
    images expanded. Raises ValueError when they belong to other ids than were sent."""
    if not request.scored:
        return []
    scored = list(zip(request.token_ids[-request.scored :], steps[-request.scored :], strict=False))
    if len(steps) < len(request.token_ids) or any(token not in step for token, step in scored):
        raise ValueError("log-probs of other tokens than were sent")
    return [step[token] for token, step in scored]
