"""Sampling from a transformers model, cheaper than its own `generate` where many responses share a prompt: the prompt
is prefilled once for all its responses, finished responses leave the batch, shared key heads are never repeated, and
the log-probability of each sampled token is kept.

P prompts, R responses side by side, W prompt width (left-padded), S new tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vold.config.schema import SamplingConfig
from vold.rollout.sampling_vocabulary import SamplingVocabulary
from vold.rollout.transformers.router_tap import RouterTap
from vold.rollout.transformers.shared_prompt import SharedPromptLayer, shared_prompt_attention

GROUPED_SDPA = "vold_grouped_sdpa"
SWEEP_EVERY = 8  # decoding steps between removals of finished responses, each of which waits for the device


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    copies: Sequence[int],
    config: SamplingConfig,
    vocabulary: SamplingVocabulary,
    generator: torch.Generator,
    tap: RouterTap,
) -> tuple[Tensor, Tensor]:
    """Sample `copies[i]` responses for row i of `inputs` (input_ids and attention_mask [P, W], image inputs) with the
    random numbers of `generator`.

    Returns ids int64 [R, S] and their log-probabilities float32 [R, S] in nats at the sampling temperature, before
    top-p and top-k. Entries after a response's first stop token have no meaning. tap: notes the chosen experts.
    """
    prompt_of_R = torch.arange(len(copies)).repeat_interleave(torch.tensor(copies)).to(inputs["input_ids"].device)
    cache, logits_PV, next_position_P = _prefill(model, inputs)
    tap.note_prompts(inputs["attention_mask"])
    _share_prompts(cache, prompt_of_R, inputs["attention_mask"])
    logits_RV, position_R = logits_PV[prompt_of_R], next_position_P[prompt_of_R]
    mask_RW = inputs["attention_mask"][prompt_of_R].bool()

    rows, steps = len(prompt_of_R), config.max_new_tokens
    ids_RS = torch.zeros(rows, steps, dtype=torch.int64, device=logits_RV.device)
    logp_RS = torch.zeros(rows, steps, dtype=torch.float32, device=logits_RV.device)
    row_of_R = torch.arange(rows, device=logits_RV.device)  # the response that each row of the batch samples
    stop = torch.tensor(vocabulary.stop_ids, device=logits_RV.device)
    finished_R = torch.zeros(rows, dtype=torch.bool, device=logits_RV.device)
    warp, ban_V = _warpers(config), _ban(vocabulary, logits_RV.device)
    for step in range(steps):
        next_R, next_logp_R = _sample(logits_RV, config.temperature, warp, ban_V, generator)
        ids_RS[row_of_R, step], logp_RS[row_of_R, step] = next_R, next_logp_R
        finished_R |= torch.isin(next_R, stop)
        if step + 1 == steps:
            break
        if step % SWEEP_EVERY == SWEEP_EVERY - 1:
            alive = (~finished_R).nonzero()[:, 0]
            if not len(alive):
                break
            if len(alive) < len(row_of_R):
                cache.batch_select_indices(alive)
                row_of_R, next_R, position_R, mask_RW = (x[alive] for x in (row_of_R, next_R, position_R, mask_RW))
                finished_R = finished_R[alive]
        mask_RW = torch.nn.functional.pad(mask_RW, (0, 1), value=True)
        out = model(
            input_ids=next_R[:, None],
            attention_mask=mask_RW[:, None, None, :],
            position_ids=position_R[:, None],
            past_key_values=cache,
        )
        tap.note_step(row_of_R, step, rows, steps)
        logits_RV, position_R = out.logits[:, -1], position_R + 1
    return ids_RS, logp_RS


def _prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Cache, Tensor, Tensor]:
    """(cache, logits [P, V] after each prompt, position [P] of the token that follows it)."""
    cache, mask_PW = _new_cache(model), inputs["attention_mask"]
    position_P = mask_PW.sum(-1)
    if "pixel_values" in inputs:  # the model computes image positions itself, and by how much they shift the text
        out = model(**inputs, past_key_values=cache, logits_to_keep=1)
        position_P = position_P + model.base_model.rope_deltas.view(-1)
    else:
        positions_PW = (mask_PW.cumsum(-1) - 1).clamp_min(0)
        out = model(**inputs, position_ids=positions_PW, past_key_values=cache, logits_to_keep=1)
    return cache, out.logits[:, -1], position_P


def _new_cache(model: PreTrainedModel) -> Cache:
    """Empty, for a model whose layers have keys and values, or recurrent states in the place of some."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    layer = _layer_class(model.device)
    if "linear_attention" not in kinds:
        return Cache(layer_class_to_replicate=layer)
    return Cache(layers=[RecurrentLayer() if kind == "linear_attention" else layer() for kind in kinds])


def _layer_class(device: torch.device) -> type[DynamicLayer]:
    """The cache of a layer that attends. On a GPU launches, not memory, bound a decoding step."""
    return SharedPromptLayer if device.type == "cpu" else PreallocatedLayer


def _share_prompts(cache: Cache, prompt_of_R: Tensor, mask_PW: Tensor) -> None:
    """From rows of prompts to rows of responses."""
    for layer in cache.layers:
        if isinstance(layer, SharedPromptLayer):
            layer.share(prompt_of_R, mask_PW == 0)
        else:
            layer.batch_select_indices(prompt_of_R)


def _ban(vocabulary: SamplingVocabulary, device: torch.device) -> Tensor:
    """float32 [vocabulary.size]: 0 where an id may be sampled, -inf elsewhere."""
    ban_V = torch.zeros(vocabulary.size)
    ban_V[list(vocabulary.banned_ids)] = -torch.inf
    return ban_V.to(device)


def _sample(
    logits_RV: Tensor, temperature: float, warp: LogitsProcessorList, ban_V: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token of each row with its log-probability (nats); the most probable token at temperature 0."""
    logits_RV = logits_RV[:, : len(ban_V)].float()
    logp_RV = (logits_RV / (temperature or 1.0)).log_softmax(-1)
    scores_RV = logp_RV + ban_V
    if temperature:
        next_R = torch.multinomial(warp(None, scores_RV).exp(), 1, generator=generator)[:, 0]
    else:
        next_R = scores_RV.argmax(-1)
    return next_R, logp_RV.gather(1, next_R[:, None])[:, 0]


def _warpers(config: SamplingConfig) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


class PreallocatedLayer(DynamicLayer):
    """A growing cache with space for further tokens behind the present ones: its parent in transformers copies all keys
    and values for every new token."""

    SPARE_TOKENS = 64
    _buffers: tuple[Tensor, Tensor] | None = None  # keys and values are the front of these

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)  # the prompt
        length, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < total:
            self._buffers = tuple(_enlarged(tensor, total + self.SPARE_TOKENS) for tensor in (self.keys, self.values))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


class RecurrentLayer(LinearAttentionLayer):
    """A recurrent layer's states; its parent in transformers cannot select rows by this name."""

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def _enlarged(cached_RKLH: Tensor, length: int) -> Tensor:
    """A buffer of `length` tokens that begins with the cached ones; K key heads, L tokens, H head width."""
    buffer = cached_RKLH.new_empty(*cached_RKLH.shape[:2], length, cached_RKLH.shape[3])
    buffer[:, :, : cached_RKLH.shape[2]] = cached_RKLH
    return buffer


def _grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA that, for one new token a row, passes the query heads of a key head as queries of that head. transformers
    repeats keys and values instead, which for a single token costs more than attention itself."""
    rows, heads, new, width = query.shape
    if prompts := getattr(key, "prompts", None):
        return shared_prompt_attention(query, key, value, prompts, scaling), None
    if new > 1 or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.view(rows, key.shape[1], -1, width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.view(rows, 1, heads, width), None


AttentionInterface.register(GROUPED_SDPA, _grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
