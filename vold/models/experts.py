"""A mixture of experts in the place of a layer's MLP: each token goes to a few of its experts, chosen by a router.

The choice is transformers': softmax over all experts in fp32, then the top ones, whose weights may be normalised. No
token is dropped and no auxiliary loss is added. Experts are divided as ExpertLayout says: a token travels to the ranks
that hold its experts and back (all-to-all over ep); ranks that share each expert (etp) read each other's tokens and add
their parts up. Megatron's own MoELayer is not used: it needs CUDA streams, and its sizes are unknown on the meta
device, where `vold plan` counts memory; its groups, its gradient buffers and its optimizer are.

T tokens of this rank, k experts of a token, R rows (a token for one of its experts), D hidden width, F feed-forward
width of this rank's part of an expert, E experts, e of them on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vold.models.architecture import Mixture
from vold.models.layer_ops import layer_ops, saved_as
from vold.parallel.launch import ExpertLayout


class Router(nn.Module):
    """Chooses each token's experts. Every rank holds it undivided and reads its own tokens."""

    def __init__(self, config: TransformerConfig, mixture: Mixture):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(mixture.experts, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self._mixture = mixture

    def forward(self, x_TD: Tensor, choose: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(weights [T, k] in the dtype of x, experts [T, k]). choose: others in the place of the router's own."""
        probability_TE = F.linear(x_TD, self.weight).softmax(-1, dtype=torch.float32)
        weight_Tk, expert_Tk = probability_TE.topk(self._mixture.per_token)
        chosen_Tk = expert_Tk if choose is None else choose(expert_Tk)
        if chosen_Tk is not expert_Tk:
            weight_Tk, expert_Tk = probability_TE.gather(1, chosen_Tk), chosen_Tk
        if self._mixture.normalised:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        return weight_Tk.to(x_TD.dtype), expert_Tk


class Experts(nn.Module):
    """This rank's experts: fc1 [e, 2F, D] has gate and up rows, fc2 [e, D, F]."""

    def __init__(self, config: TransformerConfig, mixture: Mixture, layout: ExpertLayout):
        super().__init__()
        count, ffn, hidden = mixture.experts // layout.ep, mixture.ffn // layout.etp, config.hidden_size
        self.fc1 = nn.Parameter(torch.empty(count, 2 * ffn, hidden, dtype=config.params_dtype))
        self.fc2 = nn.Parameter(torch.empty(count, hidden, ffn, dtype=config.params_dtype))
        for weight, dim in ((self.fc1, 1), (self.fc2, 2)):
            mark_expert(weight, dim)
        self.recompute_swiglu = False

    def forward(self, x_RD: Tensor, end_e: Tensor) -> Tensor:
        """[R, D] -> the same. end_e int32: the row behind each expert's last."""
        gate_up_R2F = F.grouped_mm(x_RD, self.fc1.transpose(1, 2), offs=end_e)
        swiglu = layer_ops(x_RD.device.type, x_RD.dtype).swiglu
        activated_RF = swiglu(gate_up_R2F)
        again = partial(swiglu, gate_up_R2F.detach())
        with saved_as(activated_RF, again) if self.recompute_swiglu and self.training else nullcontext():
            return F.grouped_mm(activated_RF, self.fc2.transpose(1, 2), offs=end_e)


def mark_expert(weight: nn.Parameter, dim: int) -> None:
    """By `allreduce` Megatron reduces the gradient over copies of the expert, not over data-parallel ranks; by the
    others it counts each rank's part in the gradient's norm."""
    weight.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    set_tensor_model_parallel_attributes(weight, True, dim, 1)


class SharedExpert(nn.Module):
    """An MLP that every token goes to, times the sigmoid of a number of its own (Qwen3.5-MoE). Divided over the
    tensor-parallel ranks; the gate reads a rank's own tokens."""

    def __init__(self, config: TransformerConfig, ffn: int):
        super().__init__()
        linear = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, 2 * ffn, gather_output=False, **linear)
        self.linear_fc2 = RowParallelLinear(ffn, config.hidden_size, input_is_parallel=True, **linear)
        self.gate = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x_T1D: Tensor) -> Tensor:
        """[T, 1, D] -> the same."""
        swiglu = layer_ops(x_T1D.device.type, x_T1D.dtype).swiglu
        out_T1D = self.linear_fc2(swiglu(self.linear_fc1(x_T1D)[0]))[0]
        return F.linear(x_T1D, self.gate).sigmoid() * out_T1D


class MixtureOfExperts(nn.Module):
    def __init__(self, config: TransformerConfig, mixture: Mixture, layout: ExpertLayout):
        super().__init__()
        self.router, self.experts = Router(config, mixture), Experts(config, mixture, layout)
        self.shared = SharedExpert(config, mixture.shared) if mixture.shared else None
        self._mixture, self._layout = mixture, layout

    def forward(self, x_T1D: Tensor, choose: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[T, 1, D] -> the same. choose: see Router."""
        out_T1D = self._routed(x_T1D.squeeze(1), choose)
        return out_T1D if self.shared is None else out_T1D + self.shared(x_T1D)

    def _routed(self, x_TD: Tensor, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[T, D] -> [T, 1, D]"""
        layout = self._layout
        weight_Tk, expert_Tk = self.router(x_TD, choose)
        order_R = expert_Tk.flatten().argsort(stable=True)
        position_R = order_R.argsort()
        routes = _routes(expert_Tk, self._mixture.experts, layout)
        x_RD = _Rows.apply(x_TD, order_R, position_R, weight_Tk.shape[1])
        x_RD = all_to_all(layout.ep_group, x_RD, routes.received, routes.sent)
        own = [len(x_RD)] * layout.etp
        if layout.etp > 1:
            x_RD = all_to_all(layout.etp_group, x_RD.repeat(layout.etp, 1), routes.gathered, own)
        x_RD = _Rows.apply(x_RD, routes.order_R, routes.position_R, 1)
        out_RD = self.experts(x_RD, routes.end_e)
        out_RD = _Rows.apply(out_RD, routes.position_R, routes.order_R, 1)
        if layout.etp > 1:
            parts_RD = all_to_all(layout.etp_group, out_RD, own, routes.gathered)
            out_RD = parts_RD.view(layout.etp, own[0], -1).sum(0)
        out_RD = all_to_all(layout.ep_group, out_RD, routes.sent, routes.received)
        out_TkD = _Rows.apply(out_RD, position_R, order_R, 1).view(*weight_Tk.shape, -1)
        return torch.bmm(weight_Tk.unsqueeze(1), out_TkD)


class _Rows(torch.autograd.Function):
    """Rows x[order // copies]. position: the inverse of order, so that gradients are added up in a fixed order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, position_R: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(position_R)
        ctx.copies = copies
        return x_TD.index_select(0, order_R // copies if copies > 1 else order_R)

    @staticmethod
    def backward(ctx, gradient_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        [position_R] = ctx.saved_tensors
        rows_RD = gradient_RD.index_select(0, position_R)
        if ctx.copies > 1:
            rows_RD = rows_RD.view(-1, ctx.copies, rows_RD.shape[1]).sum(1)
        return rows_RD, None, None, None


@dataclass(frozen=True)
class _Routes:
    """Rows sent to and received from each rank of the ep group, rows read from each of the etp group; how the rows that
    arrive are brought into the order of this rank's experts, and back; the row behind each expert's last."""

    sent: list[int]
    received: list[int]
    gathered: list[int]
    order_R: Tensor
    position_R: Tensor
    end_e: Tensor


def _routes(expert_Tk: Tensor, experts: int, layout: ExpertLayout) -> _Routes:
    """A collective over ep and etp; the host waits for it."""
    if expert_Tk.is_meta:
        return _balanced_routes(expert_Tk, experts, layout)
    local = experts // layout.ep
    count_E = expert_Tk.flatten().bincount(minlength=experts)
    count_pqE = _gather(_gather(count_E[None], layout.ep_group)[None], layout.etp_group)  # by etp and ep rank
    count_pqe = count_pqE[:, :, layout.ep_rank * local : (layout.ep_rank + 1) * local]
    numbers = torch.cat([count_E.view(layout.ep, local).sum(1), count_pqe.sum(2).flatten()]).tolist()
    sent, arriving = numbers[: layout.ep], numbers[layout.ep :]
    by_etp = [arriving[p * layout.ep : (p + 1) * layout.ep] for p in range(layout.etp)]
    expert_of_chunk = torch.arange(local, device=count_E.device).repeat(layout.etp * layout.ep)
    order_R = expert_of_chunk.repeat_interleave(count_pqe.flatten(), output_size=sum(arriving)).argsort(stable=True)
    end_e = count_pqe.sum((0, 1)).cumsum(0).to(torch.int32)
    return _Routes(sent, by_etp[layout.etp_rank], [*map(sum, by_etp)], order_R, order_R.argsort(), end_e)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The group's x, side by side in the first dimension."""
    if group.size() == 1:
        return x
    gathered = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def _balanced_routes(expert_Tk: Tensor, experts: int, layout: ExpertLayout) -> _Routes:
    """On the meta device: every expert has as many rows."""
    rows = expert_Tk.numel()
    share = [rows // layout.ep + (rank < rows % layout.ep) for rank in range(layout.ep)]
    order_R = torch.empty(rows * layout.etp, dtype=torch.int64, device="meta")
    end_e = torch.empty(experts // layout.ep, dtype=torch.int32, device="meta")
    return _Routes(share, share, [rows] * layout.etp, order_R, torch.empty_like(order_R), end_e)
