"""Megatron's optimizer and schedule from the config's optimizer section: AdamW; norms and biases are not decayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from vold.config.schema import OptimizerConfig
from vold.models.language_model import unwrap
from vold.models.selection import rates_by_name
from vold.models.weight_rules import trained_rules
from vold.trainer.offload import OffloadedAdamW, offload_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW over the chunks' trainable parameters; fp32 main weights where `dtype` is bfloat16. Its state is divided
    over the data-parallel ranks where their wrappers divide the gradients. Weights that config.lr_groups takes have
    rates of their own. Raises ValueError for a group without a trained weight."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )
    groups = {**get_standard_config_overrides(settings), **_rate_groups(chunks, config)}
    optimizer = get_megatron_optimizer(settings, list(chunks), config_overrides=groups)
    for inner in _chain(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"] if not p.is_leaf):
            parameter.retain_grad()  # Megatron's share of an fp32 weight is a view; torch warns where its grad is read
        if config.offload:
            offload_optimizer(inner)
        else:
            _update_in_one_pass(inner)
    return optimizer


def _rate_groups(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's groups for config.lr_groups; the first pattern that takes a weight gives its rate."""
    trained = {
        short: parameter
        for chunk in map(unwrap, chunks)
        for _name, parameter, rule in trained_rules(chunk)
        for short in rule.names
    }
    rates: dict[float, set[int]] = {}
    for name, rate in rates_by_name(config.lr_groups, trained).items():
        rates.setdefault(rate, set()).add(id(trained[name]))
    groups = {}
    for rate, members in rates.items():
        takes = ParamWithNamePredicate(
            f"rate {rate}", lambda parameter, _name, members=members: id(parameter) in members
        )
        override: Any = {"max_lr": rate, "min_lr": rate * config.min_lr_ratio}
        groups[ParamKey(with_name_predicate=takes)] = ParamGroupOverride(**override)
    return groups


def _update_in_one_pass(optimizer: MegatronOptimizer) -> None:
    """On a GPU torch's AdamW reads and writes its tensors once, not once an operation, and keeps no temporary copy."""
    adamw = optimizer.optimizer
    if not isinstance(adamw, torch.optim.Adam):  # Apex's or TransformerEngine's, or a rank without parameters
        return
    parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    if parameters and all(parameter.is_cuda for parameter in parameters):
        for options in (adamw.defaults, *adamw.param_groups):
            options["fused"] = True


def _is_fused(adamw: torch.optim.Optimizer | None) -> bool:
    return isinstance(adamw, torch.optim.Adam) and bool(adamw.defaults.get("fused"))


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up then cosine or constant. Advanced *before* each update: update 1 has lr/warmup_steps, and the
    decay would reach its minimum one update after the last, so that no update has rate 0."""
    if config.warmup_steps > steps:
        raise ValueError(f"optimizer.warmup_steps = {config.warmup_steps} exceeds steps = {steps}; lower it")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


# Norm and clipping ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norm_squared(optimizer: MegatronOptimizer) -> torch.Tensor:
    """[] float32 on the device: the squared norm of the whole gradient, to the bit as Megatron has it, which reads the
    norm of every parameter on the host where neither apex nor TransformerEngine is installed. Replicas count once and
    shares add up. A collective over the ranks with parts of the gradient; `optimizer.prepare_grads` comes first."""
    total: torch.Tensor | None = None
    for inner in _chain(optimizer):
        gradients = inner.get_main_grads_for_grad_norm() if inner.get_parameters() else []
        if gradients:
            squared = torch.stack(torch._foreach_norm(gradients)).norm() ** 2.0  # pyright: ignore[reportPrivateImportUsage]
        else:
            squared = torch.zeros((), device=torch.cuda.current_device())
        dist.all_reduce(squared, group=inner.get_grad_stats_parallel_group())
        total = squared if total is None else total + squared
    assert total is not None
    return total


@torch.no_grad()
def clip_gradient(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale the gradient, of this norm, to the optimizer's `clip_grad` where it is longer; as Megatron does. A fused
    AdamW divides by the factor's inverse as it reads the gradient in the next update."""
    coefficient = optimizer.config.clip_grad / (norm + 1.0e-6)
    for inner in _chain(optimizer):
        adamw = inner.optimizer
        gradients = [p.grad for p in inner.get_parameters() if p.grad is not None]
        if _is_fused(adamw):
            is_longer = coefficient < 1.0 and bool(gradients)
            scale = gradients[0].new_full((), 1 / coefficient) if is_longer else None
            adamw.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        elif coefficient < 1.0 and gradients:
            torch._foreach_mul_(gradients, coefficient)  # pyright: ignore[reportPrivateImportUsage]


# Adam's state by model parameter, however Megatron keeps it -----------------------------------------------------------


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """True where each data-parallel rank keeps only its share of the state."""
    return isinstance(_chain(optimizer)[0], DistributedOptimizer)


def owned_range(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> slice:
    """The elements of the flattened parameter whose state this rank keeps: all, or its data-parallel share."""
    inner = _inner(optimizer, parameter)
    if not isinstance(inner, DistributedOptimizer):
        return slice(0, parameter.numel())
    if _main(optimizer, parameter) is None:
        return slice(0, 0)
    share = inner._get_model_param_range_map(parameter)["param"]
    return slice(share.start, share.end)


def state_fields(parameter: torch.nn.Parameter) -> tuple[str, ...]:
    """The tensors Adam keeps for a parameter; `main` is the fp32 master of a bfloat16 one."""
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, "main")


def optimizer_state(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Field -> the elements of `owned_range`, flat, fp32, not copied. Moments are zeros before the first update."""
    main = _main(optimizer, parameter)
    if main is None:
        return {field: torch.empty(0, device=parameter.device) for field in state_fields(parameter)}
    inner = _inner(optimizer, parameter)
    held = _held(inner, main)
    state = {"main": held.detach(), **inner.optimizer.state.get(main, {})}
    return {field: state.get(field, torch.zeros_like(held)).flatten() for field in state_fields(parameter)}


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, values: dict[str, torch.Tensor], updates: int
) -> None:
    """Set what `optimizer_state` returned. `values`: the elements of `owned_range`; `updates`: Adam's step count."""
    main = _main(optimizer, parameter)
    if main is None:
        return
    inner = _inner(optimizer, parameter)
    state, held = inner.optimizer.state[main], _held(inner, main)
    for field, value in values.items():
        target = held if field == "main" else state.setdefault(field, torch.empty_like(held))
        target.copy_(value.view(main.shape))
    if held is not main and "main" not in values:
        held.copy_(main)  # fp32 weights, which are loaded already
    on_device = any(inner.optimizer.defaults.get(flag) for flag in ("fused", "capturable"))
    state["step"] = torch.tensor(float(updates), device=main.device if on_device else "cpu")


def updates_made(optimizer: MegatronOptimizer) -> int:
    """Adam's own step count on this rank; skipped updates do not count."""
    states = [state for inner in _chain(optimizer) if inner.optimizer for state in inner.optimizer.state.values()]
    steps = [state["step"] for state in states if state]
    return int(torch.stack(steps).max()) if steps else 0


def _held(inner: MegatronOptimizer, main: torch.Tensor) -> torch.Tensor:
    """The tensor with the values of what Adam updates: its copy in CPU memory where the state is offloaded."""
    return inner.optimizer.hosts[main] if isinstance(inner.optimizer, OffloadedAdamW) else main


def _chain(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron's optimizers: one, and behind it one of a mixture's experts, whose copies are other ranks."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(chain) in (1, 2), len(chain)
    return chain


def _inner(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> MegatronOptimizer:
    """The optimizer that has the parameter."""
    return _chain(optimizer)[0 if getattr(parameter, "allreduce", True) else 1]


def _main(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The tensor that Adam updates: the fp32 master of a bfloat16 parameter, or an fp32 parameter itself; with the
    distributed optimizer this rank's flat share of it, None where it has none."""
    inner = _inner(optimizer, parameter)
    if not isinstance(inner, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter)
    position = inner.model_param_group_index_map.get(parameter)
    if position is None:
        return None
    group, index = position
    return inner.optimizer.param_groups[group]["params"][index]
