"""Attention with a gate at its output and rotation of a part of each head (Qwen3.5's layers of full attention).

T packed tokens, S keys, A query heads of this rank, K key/value heads, H head width, R rotated columns of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vold.models.layer_ops import gather_keys, layer_ops, rotate
from vold.models.layers import PackedSelfAttention, Packing


class GatedSelfAttention(PackedSelfAttention):
    """The joint projection has for each key head: of each of its query heads the query and the gate; the key; the
    value. In plain torch but for attention itself: these are a quarter of the layers."""

    def forward(self, hidden_T1D: Tensor, *, rotary_pos_emb: Tensor, packed_seq_params: Packing) -> Tensor:
        """[T, 1, D] -> the same."""
        width, packed = self._heads.width, packed_seq_params
        mixed_TKX = self.linear_qkv(hidden_T1D)[0].squeeze(1).unflatten(1, (self._heads.keys, -1))
        queries_TKX, k_TKH, v_TKH = mixed_TKX.split([mixed_TKX.shape[2] - 2 * width, width, width], dim=2)
        q_TAH, gate_TAH = queries_TKX.reshape(len(mixed_TKX), -1, 2, width).unbind(2)
        q_TAH, k_TAH = self.q_layernorm(q_TAH), self.k_layernorm(k_TKH)
        cos_sin_2TR = rotary_pos_emb[:, :, 0, 0]
        q_TAH, k_SKH = (self._rotated(x, cos_sin_2TR) for x in (q_TAH, k_TAH))
        if packed.shared_keys is not None:
            k_SKH, v_TKH = (gather_keys(x, packed.shared_keys.index_S) for x in (k_SKH, v_TKH))
        attention = layer_ops(hidden_T1D.device.type, hidden_T1D.dtype).attention
        out_TAH = attention(q_TAH, k_SKH, v_TKH, packed, self.core_attention.scale)
        return self.linear_proj((out_TAH * gate_TAH.sigmoid()).flatten(1)[:, None])[0]

    @staticmethod
    def _rotated(x_TAH: Tensor, cos_sin_2TR: Tensor) -> Tensor:
        turned, kept = x_TAH.tensor_split([cos_sin_2TR.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, cos_sin_2TR), kept], dim=-1)
