"""A gated delta net in the place of a layer's attention (Qwen3.5): a recurrent state instead of keys and values.

State and convolution begin anew with each sequence of a packing; a shared prompt's are carried into each of its
responses (vold.models.runs). Tensor-parallel ranks have different heads; sequence parallelism is the linear layers'.

T packed tokens, K key heads of this rank, A value heads, H width of a key, W width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vold.models.architecture import DeltaNet
from vold.models.delta_rule import causal_convolution
from vold.models.layer_ops import layer_ops
from vold.models.layers import Packing
from vold.models.runs import Runs


class GatedDeltaNet(MegatronModule):
    """in_proj has the rows of q, k, v, of the output's gate, of beta and of the decay, each those of this rank's heads;
    conv the channels of q, k and v."""

    def __init__(self, config: TransformerConfig, *, shape: DeltaNet, **_megatron):
        super().__init__(config)
        tp, dtype = config.tensor_model_parallel_size, config.params_dtype
        self._key_heads, self._value_heads = shape.key_heads // tp, shape.value_heads // tp
        self._shape, self._eps = shape, config.layernorm_epsilon
        keys, values = self._key_heads * shape.key_width, self._value_heads * shape.value_width
        self._qkv, self._parts = [keys, keys, values], [2 * keys + values, values, *[self._value_heads] * 2]
        linear = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
        self.in_proj = ColumnParallelLinear(config.hidden_size, sum(self._parts) * tp, gather_output=False, **linear)
        self.out_proj = RowParallelLinear(values * tp, config.hidden_size, input_is_parallel=True, **linear)
        self.conv = nn.Parameter(torch.empty(self._parts[0], 1, shape.window, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(self._value_heads, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(self._value_heads, dtype=dtype))
        for parameter in (self.conv, self.A_log, self.dt_bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.norm = nn.Parameter(torch.empty(shape.value_width, dtype=dtype))

    def forward(self, hidden_T1D: Tensor, *, packed_seq_params: Packing, **_rotary) -> Tensor:
        """[T, 1, D] -> the same."""
        runs, shape = packed_seq_params.runs, self._shape
        mixed_TX, gate_TX, beta_TA, decay_TA = self.in_proj(hidden_T1D)[0].squeeze(1).split(self._parts, dim=-1)
        mixed_TX = F.silu(causal_convolution(mixed_TX, self.conv, runs.windows(shape.window)))
        q_TX, k_TX, v_TX = mixed_TX.split(self._qkv, dim=-1)
        q_TKH, k_TKH = (x.unflatten(1, (-1, shape.key_width)) for x in (q_TX, k_TX))
        qkv = (q_TKH, k_TKH, v_TX.unflatten(1, (-1, shape.value_width)))
        decay_TA = -self.A_log.float().exp() * F.softplus(decay_TA.float() + self.dt_bias)
        out_TAW = self._over_runs(qkv, decay_TA[runs.order_T], beta_TA.sigmoid()[runs.order_T], runs)[runs.place_T]
        return self.out_proj(self._gated_norm(out_TAW, gate_TX).flatten(1)[:, None])[0]

    def _over_runs(self, qkv: tuple[Tensor, Tensor, Tensor], decay_TA: Tensor, beta_TA: Tensor, runs: Runs) -> Tensor:
        """The delta rule over the tokens in the order of the runs; what goes on has its parent's last state."""
        rule = layer_ops(decay_TA.device.type, qkv[0].dtype).delta_rule
        counts = [sum(lengths.lengths) for lengths in runs.lengths]
        parts = zip(*(x.split(counts) for x in (*qkv, decay_TA, beta_TA)), strict=True)
        outs, state_RAHW = [], None
        for lengths, (q, k, v, decay, beta) in zip(runs.lengths, parts, strict=True):
            start_RAHW = None if state_RAHW is None else F.embedding(runs.parents, state_RAHW.flatten(1))
            if start_RAHW is not None:
                start_RAHW = start_RAHW.unflatten(1, state_RAHW.shape[1:])
            out, state_RAHW = rule((q, k, v), decay, beta, start_RAHW, lengths)
            outs.append(out)
        return torch.cat(outs)

    def _gated_norm(self, out_TAW: Tensor, gate_TX: Tensor) -> Tensor:
        """RMSNorm of each head, whose weight all ranks have for their own heads, times silu(gate)."""
        weight_W = copy_to_tensor_model_parallel_region(self.norm)  # sums its gradient over the ranks
        normed = F.rms_norm(out_TAW.float(), weight_W.shape, None, self._eps).to(out_TAW.dtype)
        return (weight_W * normed * F.silu(gate_TX.view_as(out_TAW).float())).to(out_TAW.dtype)
