"""Decoding on a CPU without copies of prompts: the responses to a prompt read its keys and values where they are.

Memory bounds attention there, and half of what it reads is the prompt, once for each of its responses. Here all queries
of a prompt's responses meet its keys in one matmul; each response has a buffer of its own for what it samples.

P prompts, C places for the responses of each, R responses in the batch, W prompt width (left-padded), S sampled tokens,
K key heads, G query heads of each, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 64  # for which a response's buffer has room before it is copied into a larger one


@dataclass(frozen=True)
class Siblings:
    """Which response reads which prompt: R of them, in the order of their prompts, in P x C places.

    place_R is None where every place is taken: rows are places then.
    """

    prompts: int
    places: int
    place_R: Tensor | None

    @classmethod
    def of(cls, prompt_R: Tensor, prompts: int) -> Siblings:
        """prompt_R: int64, ascending."""
        count_P = prompt_R.bincount(minlength=prompts)
        places = int(count_P.max())
        if places * prompts == len(prompt_R):
            return cls(prompts, places, None)
        first_P = count_P.cumsum(0) - count_P
        return cls(prompts, places, prompt_R * places + torch.arange(len(prompt_R)) - first_P[prompt_R])

    def by_prompt(self, x_KRGn: Tensor) -> Tensor:
        """[K, R, G, n] -> [K P, C G, n], 0 where no response is."""
        if self.place_R is not None:
            heads, _, *others = x_KRGn.shape
            places = x_KRGn.new_zeros(heads, self.prompts * self.places, *others)
            x_KRGn = places.index_copy_(1, self.place_R, x_KRGn)
        return x_KRGn.unflatten(1, (self.prompts, self.places)).flatten(0, 1).flatten(1, 2)

    def by_response(self, x_KPCn: Tensor, heads: int) -> Tensor:
        """[K P, C G, n] -> [K, R, G, n]"""
        x_KRGn = x_KPCn.unflatten(1, (self.places, -1)).unflatten(0, (heads, -1)).flatten(1, 2)
        return x_KRGn if self.place_R is None else x_KRGn.index_select(1, self.place_R)


@dataclass(frozen=True)
class PromptKeys:
    """One layer's keys and values of the prompts, [K, P, W, H], and who reads them. padding_P1W: True where no token
    is."""

    keys: Tensor
    values: Tensor
    padding_P1W: Tensor
    siblings: Siblings

    def of(self, read: Tensor, siblings: Siblings) -> PromptKeys:
        """Of the prompts `read` alone."""
        if len(read) == len(self.padding_P1W):
            return replace(self, siblings=siblings)
        return PromptKeys(self.keys[:, read], self.values[:, read], self.padding_P1W[read], siblings)


class SharedPromptLayer(DynamicLayer):
    """The cache of one layer: of the prompts alone until `share`, then also of each response's tokens.

    `update` returns the responses' keys and values [R, K, S, H]; the prompts' are on the keys, as `prompts`.
    """

    _prompts: PromptKeys | None = None
    _prompt_R: Tensor
    _buffers: tuple[Tensor, Tensor]  # keys and values of the responses, [K, R, S and spare, H]
    _sampled = 0

    def share(self, prompt_R: Tensor, padding_PW: Tensor) -> None:
        """From here on there is a row for each response; prompt_R: its prompt, ascending."""
        keys, values = (x.transpose(0, 1).contiguous() for x in (self.keys, self.values))
        self._prompts = PromptKeys(keys, values, padding_PW[:, None], Siblings.of(prompt_R, len(padding_PW)))
        self._prompt_R, (heads, _, _, width) = prompt_R, keys.shape
        shape = heads, len(prompt_R), SPARE_TOKENS, width
        self._buffers = keys.new_empty(shape), keys.new_empty(shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self._prompts is None:
            return super().update(key_states, value_states)
        total, room = self._sampled + key_states.shape[2], self._buffers[0].shape[2]
        if total > room:
            self._buffers = tuple(F.pad(x, (0, 0, 0, total - room + SPARE_TOKENS)) for x in self._buffers)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._sampled : total] = new.transpose(0, 1)
        self._sampled = total
        keys, values = (buffer[:, :, :total].transpose(0, 1) for buffer in self._buffers)
        keys.prompts = self._prompts
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Responses leave the batch, and prompts that none of the others reads."""
        assert self._prompts is not None
        self._buffers = tuple(buffer[:, indices] for buffer in self._buffers)
        read, self._prompt_R = self._prompt_R[indices].unique(return_inverse=True)
        self._prompts = self._prompts.of(read, Siblings.of(self._prompt_R, len(read)))

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self._sampled


def shared_prompt_attention(query: Tensor, keys: Tensor, values: Tensor, prompts: PromptKeys, scale: float) -> Tensor:
    """[R, A, 1, H] -> [R, 1, A, H]: one new token of each response over its prompt and what it has sampled, keys and
    values [R, K, S, H]."""
    rows, queries, _, width = query.shape
    siblings, heads, prompt_width = prompts.siblings, keys.shape[1], prompts.keys.shape[2]
    query_KRGH = (query.view(rows, heads, -1, width) * scale).transpose(0, 1).contiguous()
    prompt_keys, prompt_values = prompts.keys.flatten(0, 1), prompts.values.flatten(0, 1)
    keys_xSH, values_xSH = (x.transpose(0, 1).flatten(0, 1) for x in (keys, values))  # x = K R

    prompt_scores = torch.bmm(siblings.by_prompt(query_KRGH), prompt_keys.transpose(1, 2))
    prompt_scores.unflatten(0, (heads, -1)).masked_fill_(prompts.padding_P1W, -torch.inf)
    own_scores = torch.bmm(query_KRGH.flatten(0, 1), keys_xSH.transpose(1, 2)).unflatten(0, (heads, rows))
    weights = torch.cat((siblings.by_response(prompt_scores, heads), own_scores), dim=-1).softmax(-1)
    of_prompt = siblings.by_prompt(weights[..., :prompt_width])
    out_KRGH = siblings.by_response(torch.bmm(of_prompt, prompt_values), heads)
    out_KRGH.flatten(0, 1).baddbmm_(weights[..., prompt_width:].flatten(0, 1), values_xSH)
    return out_KRGH.transpose(0, 1).reshape(rows, 1, queries, width)
