"""Our kernels' and Liger's pieces give the numbers torch's give: each piece, and the whole model through all of them.

On a CPU, the Triton kernels run through the interpreter, in a process of their own: TRITON_INTERPRET has to be set
before the first `import triton`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_day.part import can_interpret
from support import tiny
from vold.models import layer_ops, layers
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states
from vold.models.layer_ops import LayerOps, sdpa_attention
from vold.models.weights import load_pretrained
from vold_kernels.qkv import Heads, SharedKeys

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIGER = importlib.util.find_spec("liger_kernel") is not None
runs_liger = pytest.mark.skipif(
    not LIGER or not (CUDA or INTERPRETED), reason="needs liger-kernel, and CUDA or Triton's interpreter"
)
TORCH_OPS = layer_ops.TORCH_OPS
GPU_OPS = LayerOps(
    layer_ops.vold_rms_norm, layer_ops.vold_add_norm, layer_ops.vold_qkv, layer_ops.liger_swiglu, sdpa_attention
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()


def cases():
    """piece, arguments that need a gradient, the others; shapes on and off the kernels' block edges."""
    for width in (64, 100):
        yield pytest.param("rms_norm", (draw(7, 1, width), draw(width, seed=1)), (1e-6,), id=f"norm-{width}")
        inputs = (draw(7, 1, width), draw(7, 1, width, seed=1), draw(width, seed=2))
        yield pytest.param("add_norm", inputs, (1e-6,), id=f"add-norm-{width}")
        yield pytest.param("swiglu", (draw(7, 1, 2 * width),), (), id=f"swiglu-{width}")
    for queries, keys, eps in ((4, 2, None), (3, 3, 1e-6)):
        angles = draw(7, 16, seed=2).detach().repeat(1, 2)
        heads = Heads(queries, keys, 32, eps)
        for shared in (None, SharedKeys(torch.tensor([0, 1, 2, 3, 0, 1, 4, 5, 6]).to(DEVICE), 7)):
            others = (torch.stack((angles.cos(), angles.sin())), heads, shared)
            yield pytest.param(
                "qkv",
                (draw(7, (queries + 2 * keys) * 32),),
                others,
                id=f"qkv-{queries}-{bool(shared)}",
            )


@runs_liger
@pytest.mark.parametrize(("piece", "inputs", "others"), cases())
def test_the_kernels_agree_with_torch(piece, inputs, others):
    found = {}
    if piece == "qkv":
        norms = None if others[1].eps is None else (draw(32, seed=8).detach(), draw(32, seed=9).detach())
        others = (norms, *others)
    for name, ops in (("kernels", GPU_OPS), ("torch", TORCH_OPS)):
        outs = getattr(ops, piece)(*(x * 1 for x in inputs), *others)
        outs = outs if isinstance(outs, tuple) else (outs,)
        upstream = [draw(*out.shape, seed=3 + i).detach() for i, out in enumerate(outs)]
        found[name] = (*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, upstream))
    for ours, expected in zip(found["kernels"], found["torch"], strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@runs_liger
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "llama"])
def test_a_model_through_the_kernels_has_transformers_gradients(family, tmp_path, layout, monkeypatch):
    """qwen3: norms on queries and keys; qwen2.5-vl: biases, three-axis rotation with images' positions; llama: none."""
    monkeypatch.setattr(layers, "layer_ops", lambda device, dtype: GPU_OPS)
    reference = tiny.FAMILIES[family]()
    directory = tiny.save(reference, tmp_path / "c")
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.float32)
    load_pretrained(model, directory)
    rows = [tiny.text_row(9), tiny.text_row(5, seed=2)]
    upstream = [draw(len(row.ids), tiny.VOCAB, seed=i).detach() for i, row in enumerate(rows)]
    reference.to(DEVICE)
    for row, up in zip(rows, upstream, strict=True):
        reference(row.ids[None].to(DEVICE)).logits[0].backward(up)
    tokens = tiny.pack(rows).to(torch.device(DEVICE))
    (hidden_states(model, tokens) @ model.head_weight().T).backward(torch.cat(upstream))
    error, name = tiny.worst_gradient_error(model, reference)
    assert error <= 1e-5, name


def test_one_choice_for_a_device_and_a_dtype(monkeypatch):
    installed = set()
    monkeypatch.setattr(layer_ops, "_installed", lambda package: package in installed)
    choose = layer_ops.layer_ops.__wrapped__  # without its cache
    cpu = "rms_norm torch, add_norm torch, qkv torch, swiglu torch, attention sdpa, delta_rule torch"
    cuda = "rms_norm vold, add_norm vold, qkv vold, swiglu {}, attention {}, delta_rule {}"
    assert str(choose("cpu", torch.bfloat16)) == cpu
    assert str(choose("cuda", torch.bfloat16)) == cuda.format("torch", "varlen", "torch")
    installed |= {"liger_kernel", "flash_attn", "fla"}
    assert str(choose("cpu", torch.bfloat16)) == cpu
    assert str(choose("cuda", torch.bfloat16)) == cuda.format("liger", "flash", "fla")
    assert str(choose("cuda", torch.float32)) == cuda.format("liger", "sdpa", "torch")


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """The signature of hopper/flash_attn_interface.py (flash-attention, commit 01afd16d); its numbers by sdpa."""
    assert causal and seqused_q is None and not return_attn_probs and deterministic in (False, True)
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_k}
    packed = layers.Packing(**bounds, max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_k)
    return sdpa_attention(q, k, v, packed, softmax_scale)


@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("returns_totals", [False, True])
def test_flash_attention_3_is_taken_on_hopper_where_installed(capability, returns_totals, monkeypatch):
    package = types.ModuleType("flash_attn_interface")
    attend = flash_attn_varlen_func
    package.flash_attn_varlen_func = (lambda *a, **o: (attend(*a, **o), None)) if returns_totals else attend
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(layer_ops, "_installed", lambda name: name in ("flash_attn", "flash_attn_interface"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    chosen = layer_ops.layer_ops.__wrapped__("cuda", torch.bfloat16).attention
    assert chosen is (layer_ops.flash3_attention if capability == 9 else layer_ops.flash_attention)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = layers.Packing(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=3, max_seqlen_kv=3)
    qkv = [torch.randn(5, 2, 8) for _ in range(3)]
    expected = sdpa_attention(*qkv, packed, 0.3)
    assert torch.equal(layer_ops.flash3_attention(*qkv, packed, 0.3), expected)


def test_norm_weights_keep_their_names_and_their_sequence_parallel_mark(tmp_path, layout):
    directory = tiny.save(tiny.qwen3(), tmp_path / "c")
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.float32)
    names = [name for name, p in model.named_parameters() if hasattr(p, "sequence_parallel")]
    assert sum("layernorm" in name for name in names) == 2 * 4 + 1
    assert not any("activation" in name for name, _ in model.named_parameters())


@pytest.mark.skipif(INTERPRETED or CUDA or not LIGER, reason="tested directly already, or liger-kernel is missing")
@pytest.mark.skipif(not can_interpret(), reason="Triton 3.6 interprets with numpy < 2.4 alone")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed, 1 skipped" in done.stdout, done.stdout + done.stderr


def test_a_norm_computed_ahead_is_found_once_and_by_its_owner(tmp_path, layout):
    directory = tiny.save(tiny.qwen3(), tmp_path / "c")
    arch = Architecture.from_pretrained(directory)
    model = build_language_model(arch, layout, torch.float32)
    first, second = model.decoder.layers[:2]
    assert first._next_norm == (second.input_layernorm,)
    assert model.decoder.layers[-1]._next_norm == (model.decoder.final_layernorm,)
    x, ahead = torch.ones(3, 1, arch.hidden), torch.full((3, 1, arch.hidden), 7.0)
    x.norm_ahead = (second.input_layernorm, ahead)
    assert first.input_layernorm(x) is not ahead
    assert second.input_layernorm(x) is ahead and second.input_layernorm(x) is not ahead
    x.norm_ahead = (second.input_layernorm, ahead)  # made without gradient, as inside a recomputed segment
    assert second.input_layernorm(x.requires_grad_()) is not ahead
    recomputed = build_language_model(arch, replace(layout, recompute="full"), torch.float32)
    assert all(layer._next_norm == () for layer in recomputed.decoder.layers)
