"""The default engine: transformers' `generate`, left-padded, on the rank's own device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from vold.config.schema import SamplingConfig
from vold.models.images import ImageReader
from vold.models.tokenizer import load_tokenizer
from vold.records import Prompt, Rollout


class TransformersSampler:
    """A transformers model on `device`; text and images in, sampled token ids with their log-probabilities out."""

    def __init__(self, checkpoint: Path, *, dtype: torch.dtype, device: torch.device):
        self._tokenizer = load_tokenizer(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        sees = hasattr(config, "vision_config")
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self._model = auto.from_pretrained(checkpoint, dtype=dtype, local_files_only=True).to(device).eval()
        self.images = ImageReader(checkpoint) if sees else None
        self._device = device
        self._stop_ids = _stop_ids(self._model.generation_config, self._tokenizer)
        self._real_ids = len(self._tokenizer)
        self._banned = [config.image_token_id] if sees else []

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """See Sampler. Sampling never touches the global random state."""
        repeated = (prompt for prompt in prompts for _ in range(responses))
        rollouts: list[Rollout] = []
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(seed)
            while chunk := list(islice(repeated, config.sequences_per_call)):
                rollouts += self._generate(chunk, config)
        return rollouts

    @torch.no_grad()
    def score(self, prompt: Prompt, response_ids: Sequence[int]) -> list[float]:
        """See Sampler. One sequence, no padding."""
        inputs = self._inputs([prompt])
        response = torch.tensor([list(response_ids)], device=self._device)
        inputs = _append(inputs, response)
        logits = self._model(**inputs, use_cache=False, logits_to_keep=len(response_ids) + 1).logits[0, :-1]
        logp = _mask_padding(logits.float(), self._real_ids).log_softmax(-1)
        return logp.gather(1, response[0, :, None])[:, 0].tolist()

    @torch.no_grad()
    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler. Frozen weights (the vision tower) are not in the stream and stay as loaded."""
        own = dict(self._model.named_parameters(remove_duplicate=False))
        for name, tensor in named_weights:
            if name not in own:
                raise ValueError(f"weight {name} is unknown to the sampler's model {type(self._model).__name__}")
            own[name].copy_(tensor)

    # -- one generate call -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _generate(self, prompts: list[Prompt], config: SamplingConfig) -> list[Rollout]:
        inputs = self._inputs(prompts)
        width = inputs["input_ids"].shape[1]
        recorder = LogprobRecorder(self._real_ids, self._banned, width, config.temperature or 1.0)
        settings = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=config.temperature > 0,
            **(_sampling(config) if config.temperature > 0 else {}),
            eos_token_id=self._stop_ids,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        out = self._model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([recorder])
        )
        logp = recorder.finish(out)
        return [
            self._rollout(prompt, ids, logps, config.max_new_tokens)
            for prompt, ids, logps in zip(prompts, out[:, width:].tolist(), logp.tolist(), strict=True)
        ]

    def _rollout(self, prompt: Prompt, ids: list[int], logps: list[float], limit: int) -> Rollout:
        """The length is where the first stop token stands, never where padding seems to begin."""
        stops = [place for place, token in enumerate(ids) if token in self._stop_ids]
        length = stops[0] + 1 if stops else len(ids)
        return Rollout(
            prompt=prompt,
            response_ids=tuple(ids[:length]),
            logp_rollout=tuple(logps[:length]),
            finish_reason="stop" if stops else "length",
            text=self._tokenizer.decode(ids[: length - bool(stops)], skip_special_tokens=True),
        )

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded ids and mask; with images also their pixels, grids and token types."""
        images = [self.images.read(prompt.images) if prompt.images else None for prompt in prompts]
        rows = [
            self.images.expand(prompt.token_ids, image) if image else list(prompt.token_ids)
            for prompt, image in zip(prompts, images, strict=True)
        ]
        ids = torch.full((len(rows), max(map(len, rows))), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (row_ids, row_mask) in zip(rows, zip(ids, mask, strict=True), strict=True):
            row_ids[-len(row) :] = torch.tensor(row)
            row_mask[-len(row) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(images):
            seen = [image for image in images if image]
            inputs["pixel_values"] = torch.cat([image.pixel_values for image in seen]).to(self._model.dtype)
            inputs["image_grid_thw"] = torch.cat([image.grid_thw for image in seen])
            inputs["mm_token_type_ids"] = (ids == self.images.token_id).long()
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}


class LogprobRecorder(LogitsProcessor):
    """Keeps log p(sampled id) at the sampling temperature (before top-p and top-k) while `generate` runs: the
    distribution of one step is held until the next call shows which id was drawn, so memory is one [rows, V] tensor.

    Ids beyond the tokenizer (padded head rows) and `banned` ids (image pads) can not be drawn.
    """

    def __init__(self, real_ids: int, banned: list[int], prompt_width: int, temperature: float):
        self._real_ids, self._banned, self._width, self._temperature = real_ids, banned, prompt_width, temperature
        self._pending: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._collect(input_ids)
        scores = _mask_padding(scores.float(), self._real_ids)
        self._pending = (scores / self._temperature).log_softmax(-1)
        return scores.index_fill(1, torch.tensor(self._banned, device=scores.device, dtype=torch.long), -torch.inf)

    def finish(self, sequences: Tensor) -> Tensor:
        """[rows, new tokens] once generation is over."""
        self._collect(sequences)
        return torch.stack(self._drawn, dim=1)

    def _collect(self, input_ids: Tensor) -> None:
        if self._pending is not None and input_ids.shape[1] > self._width + len(self._drawn):
            drawn = input_ids[:, self._width + len(self._drawn), None]
            self._drawn.append(self._pending.gather(1, drawn)[:, 0])


def _sampling(config: SamplingConfig) -> dict:
    return {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}


def _stop_ids(generation: GenerationConfig, tokenizer) -> list[int]:
    """The generation config's list (Qwen3 has two), or the tokenizer's end token."""
    stop = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    return list(stop) if isinstance(stop, list | tuple) else [stop]


def _mask_padding(logits: Tensor, real_ids: int) -> Tensor:
    if logits.shape[-1] > real_ids:
        logits = logits.clone()
        logits[..., real_ids:] = -torch.inf
    return logits


def _append(inputs: dict[str, Tensor], response: Tensor) -> dict[str, Tensor]:
    """Prompt inputs followed by response ids."""
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], response], dim=1)
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    if "mm_token_type_ids" in inputs:
        grown["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(response)], dim=1)
    return grown
