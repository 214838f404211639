"""Attention over packed sequences, rotary angles and bfloat16 accuracy."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from support import tiny
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states
from vold.models.layer_ops import flash_attention, sdpa_attention, varlen_attention
from vold.models.layers import Packing, Rotary
from vold.models.weights import load_pretrained

SHAPES = ((5, 5), (1, 1), (130, 130), (64, 69), (64, 69), (1, 131))  # of each segment: queries, keys


def packed_qkv(device="cpu", dtype=torch.float32, heads=4, kv_heads=2, width=64):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (sum(lengths) for lengths in zip(*SHAPES, strict=True))
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    qkv = [torch.randn(*size, width, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    bounds = torch.tensor([(0, 0), *SHAPES]).cumsum(0).int().T.contiguous().to(device)
    longest = torch.tensor(SHAPES).amax(0).tolist()
    packed = Packing(cu_seqlens_q=bounds[0], cu_seqlens_kv=bounds[1], max_seqlen_q=longest[0], max_seqlen_kv=longest[1])
    return qkv, packed


def attention_by_hand(q_TAH, k_SKH, v_SKH, scale):
    """float64 softmax attention with one mask over the whole packing."""
    q, k, v = (x.detach().double().cpu() for x in (q_TAH, k_SKH, v_SKH))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    visible = torch.block_diag(*(torch.ones(shape).tril(shape[1] - shape[0]) for shape in SHAPES)).bool()
    scores = torch.einsum("qah,kah->aqk", q, k) * scale
    return torch.einsum("aqk,kah->qah", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def test_sdpa_attends_causally_inside_each_segment():
    qkv, packed = packed_qkv()
    out = sdpa_attention(*qkv, packed, 0.1)
    torch.testing.assert_close(out.double(), attention_by_hand(*qkv, 0.1), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attend", [varlen_attention, flash_attention])
def test_gpu_kernels_are_as_accurate_as_sdpa(attend):
    if attend is flash_attention and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    qkv, packed = packed_qkv("cuda", torch.bfloat16)
    expected = attention_by_hand(*qkv, 0.1)
    results = {}
    for name, f in {"ours": attend, "sdpa": sdpa_attention}.items():
        out = f(*qkv, packed, 0.1)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results[name] = (out.double().cpu() - expected, *torch.autograd.grad(out, qkv, upstream))
    assert results["ours"][0].abs().max() <= 2 * results["sdpa"][0].abs().max() + 1e-3
    for ours, theirs in zip(results["ours"][1:], results["sdpa"][1:], strict=True):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_rotary_angles_are_bit_equal_to_transformers():
    model = tiny.qwen2_5_vl()
    positions = torch.randint(0, 40_000, (3, 1, 50), generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen2_5_VLRotaryEmbedding(model.config.text_config)(torch.zeros(1), positions)
    rotary = Rotary(Architecture.from_config(model.config), torch.device("cpu")).to(torch.bfloat16)  # stays float32
    ours = rotary(positions, [2, 3, 3])[:, :, 0, 0]
    if cos.dim() == 4:  # per axis: choose as apply_multimodal_rotary_pos_emb does
        axis = torch.tensor([0] * 2 + [1] * 3 + [2] * 3).repeat(2)
        cos, sin = (x[axis, 0, :, torch.arange(16)].T[None] for x in (cos, sin))
    assert ours.dtype == torch.float32
    assert torch.equal(ours[0], cos[0]) and torch.equal(ours[1], sin[0])


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {  # Llama 3.1's, for 1 / 64 of its length
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", SCALED)
def test_logits_with_a_scaled_rope_equal_transformers(kind, family, tmp_path, layout):
    reference = tiny.FAMILIES[family](rope_parameters=SCALED[kind])
    plain = tiny.FAMILIES[family](rope_parameters={"rope_type": "default", "rope_theta": SCALED[kind]["rope_theta"]})
    row = tiny.text_row(300)
    expected = row.logits(reference)
    assert (expected - row.logits(plain)).abs().max() > 0.02, "the scaling matters here"
    model = build_language_model(
        Architecture.from_pretrained(tiny.save(reference, tmp_path / "c")), layout, torch.float32
    )
    load_pretrained(model, tmp_path / "c")
    ours = hidden_states(model, tiny.pack([row])) @ model.head_weight().T
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_is_as_accurate_as_transformers(family, tmp_path, layout):
    exact = tiny.FAMILIES[family](tied=False).bfloat16().float()
    reference = tiny.FAMILIES[family](tied=False).bfloat16()
    directory = tiny.save(reference, tmp_path / "c")
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.bfloat16)
    load_pretrained(model, directory)
    rows = [tiny.text_row(40, seed=s) for s in range(4)]
    expected = torch.cat([row.logits(exact) for row in rows])
    theirs = torch.cat([row.logits(reference) for row in rows]).float() - expected
    ours = (hidden_states(model, tiny.pack(rows)) @ model.head_weight().T).float() - expected
    if model.arch.mixture is not None:  # a token of which rounding chose another expert says nothing about accuracy
        ours, theirs = (error.square().mean(-1).sqrt().median() for error in (ours, theirs))
    assert ours.square().mean().sqrt() <= 1.2 * theirs.square().mean().sqrt()
