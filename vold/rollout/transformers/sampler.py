"""The default engine: a transformers model on the rank's own device, prompts left-padded."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from vold.config.schema import SamplingConfig
from vold.models.checkpoint_dir import reading
from vold.models.checkpoint_reader import check_sizes
from vold.models.images import ImageProcessor, image_grids
from vold.parallel import cpu
from vold.rollout.sampling_vocabulary import SamplingVocabulary
from vold.rollout.transformers.decode import GROUPED_SDPA, decode
from vold.rollout.transformers.router_tap import RouterTap
from vold.types import Prompt, Rollout, TokenIds


class TransformersSampler:
    """A transformers model on `device` (see Sampler); the checkpoint decides whether it takes images. Threads may share
    it: it samples one batch, scores or loads weights at a time."""

    def __init__(self, checkpoint: Path, *, dtype: torch.dtype, device: torch.device):
        self._vocabulary = SamplingVocabulary.from_checkpoint(checkpoint)
        check_sizes(checkpoint)
        with reading(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            takes_images = hasattr(config, "vision_config")
            auto = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
            model = auto.from_pretrained(checkpoint, dtype=dtype, local_files_only=True, use_safetensors=True)
        model.get_decoder().config._attn_implementation = GROUPED_SDPA
        self._model = model.to(device).eval()
        self._tap = RouterTap(self._model)
        self.images = ImageProcessor(checkpoint) if takes_images else None
        self._device, self._version = device, 0
        self._turn = threading.Lock()

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """See Sampler."""
        return list(chain.from_iterable(self.stream(prompts, config, responses=responses, seed=seed)))

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[list[Rollout]]:
        """See Sampler; in prompt order, as batches of `config.sequences_per_call` responses are done.

        It uses its own random generator, so that it may run in a thread beside the trainer. All batches share the
        generator, so prompts in `answered` are sampled again and their rollouts dropped.
        """
        repeated = (prompt for prompt in prompts for _ in range(responses))
        generator = torch.Generator(self._device).manual_seed(seed)
        rollouts: list[Rollout] = []
        while chunk := list(islice(repeated, config.sequences_per_call)):
            with self._turn, cpu.paused():
                rollouts += self._generate(chunk, config, generator)
            while len(rollouts) >= responses:
                if rollouts[0].prompt.id not in answered:
                    yield rollouts[:responses]
                del rollouts[:responses]

    @torch.no_grad()
    def score(self, prompt: Prompt, response_ids: TokenIds | Sequence[int]) -> list[float]:
        """See Sampler. One sequence, no padding."""
        inputs = self._inputs([prompt])
        response = torch.tensor(response_ids, dtype=torch.int64, device=self._device)[None]
        inputs = _append(inputs, response)
        with self._turn:
            logits = self._model(**inputs, use_cache=False, logits_to_keep=len(response_ids) + 1).logits[0, :-1]
        logp = logits[:, : self._vocabulary.size].float().log_softmax(-1)
        return logp.gather(1, response[0, :, None])[:, 0].tolist()

    @torch.no_grad()
    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler. Frozen weights (the vision tower) are not in the stream and stay as loaded."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        with self._turn:
            for name, tensor in named_weights:
                if name not in parameters:
                    raise ValueError(f"weight {name} is unknown to the sampler's model {type(self._model).__name__}")
                parameters[name].copy_(tensor)
            self._version += 1

    # -- one batch -------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Prompt], config: SamplingConfig, generator: torch.Generator) -> list[Rollout]:
        """One response to each prompt. Neighbours that are the same object are siblings and share their prefill."""
        siblings = [list(group) for _, group in groupby(prompts, key=id)]
        inputs = self._inputs([group[0] for group in siblings])
        copies = [*map(len, siblings)]
        with self._tap.opened():
            ids, logp = decode(self._model, inputs, copies, config, self._vocabulary, generator, self._tap)
        rollouts = [
            self._vocabulary.make_rollout(prompt, ids, logps, version=self._version)
            for prompt, ids, logps in zip(prompts, ids.tolist(), logp.tolist(), strict=True)
        ]
        if not self._tap.has_routers:
            return rollouts
        places = enumerate(number for number, count in enumerate(copies) for _ in range(count))
        return [
            replace(rollout, experts=self._tap.experts(prompt, response, len(rollout.response_ids)))
            for rollout, (response, prompt) in zip(rollouts, places, strict=True)
        ]

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded ids and mask; with images also their pixels, grids and token types."""
        pictures = [self.images.read(prompt.images) if prompt.images else () for prompt in prompts]
        rows = [
            self.images.expand(prompt.token_ids, images) if images else prompt.token_ids
            for prompt, images in zip(prompts, pictures, strict=True)
        ]
        ids = torch.full((len(rows), max(map(len, rows))), self._vocabulary.pad_id)
        mask = torch.zeros_like(ids)
        for row, (row_ids, row_mask) in zip(rows, zip(ids, mask, strict=True), strict=True):
            row_ids[-len(row) :] = torch.tensor(row)
            row_mask[-len(row) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(pictures):
            flat = [picture for row in pictures for picture in row]
            inputs["pixel_values"] = torch.cat([picture.pixel_values for picture in flat]).to(self._model.dtype)
            inputs["image_grid_thw"] = image_grids(flat)
            inputs["mm_token_type_ids"] = (ids == self.images.token_id).long()
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}


def _append(inputs: dict[str, Tensor], response: Tensor) -> dict[str, Tensor]:
    """Prompt inputs followed by response ids."""
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], response], dim=1)
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    if "mm_token_type_ids" in inputs:
        grown["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(response)], dim=1)
    return grown
