"""Body of the two-process test, started by torchrun: data parallel, then tensor parallel with and without sp.

Arguments: pairs of family and checkpoint directory. Prints `ok` on every rank. One start for all cases, because
importing Megatron takes longer than they do.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from support import tiny
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states, open_vision_tower
from vold.models.weights import export_weights, load_pretrained
from vold.parallel.launch import initialise, shutdown


def data_parallel() -> None:
    layout = initialise(1, 1, seed=3)
    assert (layout.tp, layout.pp, layout.dp) == (1, 1, 2)
    total = torch.tensor([layout.dp_rank + 1.0])
    dist.all_reduce(total, group=layout.dp_group)
    assert total.item() == 3 and layout.is_first_stage and layout.is_last_stage
    draws = [torch.empty(2) for _ in range(2)]
    dist.all_gather(draws, torch.rand(2))
    assert torch.equal(*draws), "replicas must start from the same random numbers"


def does_not_divide() -> None:
    try:
        initialise(tp=3, pp=1, seed=0)
    except ValueError as error:
        assert "tp=3 x pp=1 = 3 does not divide the world of 2 processes" in str(error)
    else:
        raise AssertionError("accepted")


def tensor_parallel(family: str, sp: bool, directory: str) -> None:
    """Logits, gradients and export on two tensor-parallel ranks equal transformers' on one."""
    layout = initialise(tp=2, pp=1, seed=3, sp=sp)
    reference = tiny.FAMILIES[family]()
    arch = Architecture.from_pretrained(directory)
    model = build_language_model(arch, layout, torch.float32, train_merger=arch.vision is not None)
    load_pretrained(model, directory)
    rows = [tiny.text_row(9), tiny.text_row(8, seed=2)]  # text: T is odd; with images: one lies across both halves
    if model.arch.vision is not None:
        rows.insert(1, tiny.image_row(model.arch, (1, 8, 4), (1, 4, 4)))
    tokens, vision = tiny.pack(rows), open_vision_tower([model], directory, torch.float32)
    hidden_TD = hidden_states(model, tokens, vision and vision.features(tokens.pictures))
    # What the loss must do: complete dH over the tp group.
    logits_TU = copy_to_tensor_model_parallel_region(hidden_TD) @ model.head_weight().T
    expected_TV = torch.cat([row.logits(reference) for row in rows])
    share = slice(layout.tp_rank * logits_TU.shape[1], (layout.tp_rank + 1) * logits_TU.shape[1])
    torch.testing.assert_close(logits_TU, expected_TV[:, share], rtol=0, atol=1e-5)

    upstream_TV = torch.randn(expected_TV.shape, generator=torch.Generator().manual_seed(5))
    (logits_TU * upstream_TV[:, share]).sum().backward()
    (expected_TV * upstream_TV).sum().backward()
    _sum_replicated_gradients(model, layout)
    error, name = tiny.worst_gradient_error(model, reference)
    assert error <= 1e-4, (name, error)

    stored = {k: v for k, v in reference.state_dict().items() if "visual" not in k or "merger" in k}
    exported = dict(export_weights([model]))
    assert exported.keys() == stored.keys() and all(torch.equal(exported[k], stored[k]) for k in stored)


def _sum_replicated_gradients(model, layout) -> None:
    """Megatron's finalize_model_grads without its DDP wrapper: norms under sp, and head norms always."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            dist.all_reduce(parameter.grad, group=layout.tp_group)


if __name__ == "__main__":
    data_parallel()
    does_not_divide()
    for family, directory in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        for sp in (False, True):
            tensor_parallel(family, sp, directory)
    print("ok", flush=True)
    shutdown()
