"""The fused update, which only a GPU gets, beside the one that a CPU keeps."""

from types import SimpleNamespace

import torch

from vold.trainer.optimizer import _update_in_one_pass, clip_gradient, updates_made


def _train(fused: bool, steps: int = 20) -> tuple[torch.Tensor, torch.optim.AdamW]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 70, generator=draw))
    adamw = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused)
    for _ in range(steps):
        weight.grad = torch.randn(300, 70, generator=draw)
        adamw.step()
    return weight.detach(), adamw


def test_a_fused_update_is_the_same_up_to_rounding():
    (plain, _), (fused, adamw) = _train(False), _train(True)
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-6)
    assert updates_made(SimpleNamespace(optimizer=adamw)) == 20


def test_a_fused_update_reads_the_clipped_gradient():
    """Clipping before a plain update, and as the factor of a fused one; then an update that needs none."""
    found = []
    for fused in (False, True):
        draw = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300, 70, generator=draw))
        adamw = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused)
        wrapped = SimpleNamespace(
            optimizer=adamw, get_parameters=lambda w=weight: [w], config=SimpleNamespace(clip_grad=1.0)
        )
        for size in (1.0, 1e-4, 1.0):
            weight.grad = size * torch.randn(300, 70, generator=draw)
            clip_gradient(wrapped, float(weight.grad.norm()))
            adamw.step()
        found.append((weight.detach(), adamw.state[weight]["exp_avg_sq"]))
        assert (getattr(adamw, "grad_scale", None) is not None) == fused
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=3e-6, atol=1e-9)


def test_a_cpu_keeps_its_numbers():
    _, adamw = _train(False, steps=0)
    _update_in_one_pass(SimpleNamespace(optimizer=adamw))
    assert not adamw.defaults["fused"] and not adamw.param_groups[0]["fused"]
    assert updates_made(SimpleNamespace(optimizer=adamw)) == 0
