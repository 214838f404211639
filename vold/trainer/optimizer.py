"""Megatron's optimizer and schedule from one config. AdamW; norms and biases are not decayed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from vold.config.schema import OptimizerConfig


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW over the chunks' trainable parameters; fp32 main weights where `dtype` is bfloat16. Its state is divided
    over the data-parallel ranks where their wrapper divides the gradients."""
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
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
        ),
        list(chunks),
    )


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up then cosine or constant. Advanced *before* each update: update 1 has lr/warmup_steps, and the
    decay would reach its floor one update after the last, so no update is spent at rate 0."""
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


def optimizer_state(optimizer: MegatronOptimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adam's state by parameter name: `{name}/{exp_avg | exp_avg_sq | step | main}`; empty before the first update."""
    states = _states(optimizer)
    flat: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        main = _main(parameter)
        for key, value in states.get(main, {}).items():
            flat[f"{name}/{key}"] = torch.as_tensor(value)
        if main is not parameter:
            flat[f"{name}/main"] = main.data
    return flat


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, parameters: dict[str, torch.nn.Parameter], flat: dict[str, torch.Tensor]
) -> None:
    """The inverse of optimizer_state; raises ValueError for a name this model does not have."""
    states = _states(optimizer)
    for key, value in flat.items():
        name, _, field = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimiser state {key!r} belongs to no parameter of this model")
        main = _main(parameters[name])
        if field == "main":
            main.data.copy_(value)
        else:
            states[main][field] = value.to(main.device) if field != "step" else value.clone()


def _states(optimizer: MegatronOptimizer) -> dict:
    """parameter -> Adam state, live. Megatron chains optimizers even when there is one."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(inner) != 1:
        raise ValueError(f"expected one optimizer for a dense model, Megatron built {len(inner)}")
    return inner[0].optimizer.state


def _main(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 master of a bfloat16 parameter; the parameter itself in fp32."""
    return getattr(parameter, "main_param", parameter)
