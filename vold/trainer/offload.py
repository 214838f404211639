"""What waits in CPU memory instead of the GPU's: AdamW's state between updates, activations between the passes.

Megatron's own HybridDeviceOptimizer is not used: without its distributed optimizer the fp32 masters stay on the GPU,
and its state is neither read nor set by parameter, as checkpoints of any layout need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

SMALLEST = 1 << 20
"""Bytes of an activation below which moving it does not pay."""


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose moments and fp32 masters are in CPU memory, where it updates one parameter after another.

    masters: of a bfloat16 model Megatron's fp32 copies, among param_groups; on the device they become placeholders
    without memory, whose gradients are still the device's. Others (fp32 weights) stay there and get the result.
    hosts: parameter of param_groups -> its fp32 copy here.
    """

    def __init__(self, param_groups: list[dict], masters: Iterable[Tensor]):
        # torch refuses views as parameters, which the shards of fp32 weights are, unless it is told this
        super().__init__(param_groups, {"differentiable": True})
        self._placeholders = {id(master) for master in masters}
        self.hosts: dict[Tensor, Tensor] = {}
        self._updates: dict[Tensor, torch.optim.AdamW] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                host = nn.Parameter(_on_host(parameter.detach()))
                adamw = torch.optim.AdamW([host], fused=parameter.is_cuda)
                self.hosts[parameter], self._updates[parameter] = host, adamw
                self.state[parameter] = adamw.state[host]  # one dictionary
                if id(parameter) in self._placeholders:
                    parameter.data = parameter.new_zeros(()).expand(parameter.shape)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            numbers = {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                host, adamw = self.hosts[parameter], self._updates[parameter]
                adamw.param_groups[0].update(numbers)
                host.grad = parameter.grad.to("cpu")
                adamw.step()
                host.grad = None
                if id(parameter) not in self._placeholders:
                    parameter.copy_(host)

    def show_masters(self) -> None:
        """Let the placeholders be the copies here, for a copy to the model's weights."""
        for parameter, host in self.hosts.items():
            if id(parameter) in self._placeholders:
                parameter.data = host.data

    def hide_masters(self, device: torch.device) -> None:
        for parameter in self.hosts:
            if id(parameter) in self._placeholders:
                parameter.data = torch.zeros((), device=device).expand(parameter.shape)


def offload_optimizer(inner: MegatronOptimizer) -> None:
    """Move the state of a Megatron optimizer, made a moment ago, to CPU memory."""
    adamw = inner.optimizer
    if adamw is None:  # a rank without trained parameters
        return
    parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    groups = [*getattr(inner, "fp32_from_float16_groups", ()), *getattr(inner, "shard_fp32_from_float16_groups", ())]
    device = parameters[0].device
    offloaded = OffloadedAdamW(adamw.param_groups, (master for group in groups for master in group))
    inner.optimizer = offloaded
    copy = getattr(inner, "_copy_main_params_to_model_params", None)
    if copy is None:  # fp32 weights are their own masters
        return

    def copy_from_host() -> None:
        offloaded.show_masters()
        copy()
        offloaded.hide_masters(device)

    inner._copy_main_params_to_model_params = copy_from_host  # pyright: ignore[reportAttributeAccessIssue]


class ActivationOffload:
    """Saves activations of a forward pass in CPU memory, pinned where there is a GPU, and brings them back when the
    backward pass asks. Weights, and tensors of less than SMALLEST bytes, stay where they are.

    On the meta device nothing is copied: `bytes` counts what would be in CPU memory.
    """

    def __init__(self, model: nn.Module, smallest: int = SMALLEST):
        tensors = [*model.parameters(), *model.buffers()]
        self._kept = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._smallest, self.bytes = smallest, 0

    def forward_pass(self) -> AbstractContextManager:
        """A context for the forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Tensor | None, torch.device, torch.Size, torch.dtype]:
        if tensor.nbytes < self._smallest or tensor.untyped_storage()._cdata in self._kept:
            return tensor
        self.bytes += tensor.nbytes
        host = None if tensor.is_meta else _on_host(tensor.detach(), dtype=tensor.dtype)
        return host, tensor.device, tensor.shape, tensor.dtype

    def _unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        host, device, shape, dtype = packed
        if host is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return host.to(device, non_blocking=True)


def _on_host(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy in CPU memory, pinned where the tensor is a GPU's."""
    host = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda and dtype == tensor.dtype)
