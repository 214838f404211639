"""Body of test_gradient_norm.py: our norm and clipping beside Megatron's at every kind of division, on four ranks; and
gradients that the matmuls add to `main_grad` beside those that the data-parallel wrapper adds."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from support.steps import assign_token_weights, make_groups, make_trainer
from vold.data.packing import pack
from vold.objectives import PRESETS
from vold.parallel.launch import initialise, shutdown
from vold.trainer.optimizer import clip_gradient, gradient_norm_squared
from vold.trainer.weight_gradients import add_to_main_grad

LAYOUTS = [
    dict(),
    dict(distributed_optimizer=True),
    dict(tp=2),
    dict(tp=2, sp=True, distributed_optimizer=True),
    dict(pp=2),
    dict(tp=2, pp=2),
]
MIXED = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def check_weight_gradients(trainer, samples, tolerance: float) -> None:
    """In bf16 they are rounded less."""

    def gradients() -> list[torch.Tensor]:
        trainer.accumulate_gradients(pack(samples, max_tokens=40, replicas=trainer.replicas))
        return [parameter.main_grad.clone() for parameter in trainer.parameters.values()]

    added = gradients()
    for chunk in trainer.chunks:
        add_to_main_grad(chunk)
    linears = [module for chunk in trainer.chunks for module in chunk.decoder.modules() if hasattr(module, "weight")]
    linears = [module for module in linears if hasattr(module, "gradient_accumulation_fusion")]
    assert linears and all(linear.gradient_accumulation_fusion for linear in linears)
    in_place = gradients()
    for name, ours, expected in zip(trainer.parameters, in_place, added, strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm(), name
    assert all(torch.equal(a, b) for a, b in zip(in_place, gradients(), strict=True))


def body(student: str) -> None:
    samples = assign_token_weights("grpo", make_groups(MIXED))
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        for choices in LAYOUTS:
            layout = initialise(seed=0, **choices)
            trainer = make_trainer(Path(student), layout, objective=PRESETS["grpo"], dtype=dtype, clip_grad=1e-3)
            trainer.accumulate_gradients(pack(samples, max_tokens=40, replicas=trainer.replicas))
            trainer.optimizer.prepare_grads()
            norm = gradient_norm_squared(trainer.optimizer).item() ** 0.5
            assert norm == trainer.optimizer.get_grad_norm(), choices
            [inner] = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
            owned = [parameter for parameter in inner.get_parameters() if parameter.grad is not None]
            before = [parameter.grad.clone() for parameter in owned]
            clip_gradient(trainer.optimizer, norm)
            ours = [parameter.grad.clone() for parameter in owned]
            for parameter, gradient in zip(owned, before, strict=True):
                parameter.grad.copy_(gradient)
            clip_grad_by_total_norm_fp32(owned, 1e-3, norm)
            assert all(torch.equal(x, p.grad) for x, p in zip(ours, owned, strict=True)), choices
            assert not before or any((x != y).any() for x, y in zip(ours, before, strict=True))
            norms.append(norm)
            check_weight_gradients(trainer, samples, {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype])
    assert max(norms[: len(LAYOUTS)]) / min(norms[: len(LAYOUTS)]) < 1 + 1e-4, norms  # shares and replicas
    shutdown()
