"""transformers' packed call of a model with gated delta nets, on a machine without their kernels, is silently wrong:
state and convolution run on from one sequence into the next. Ours equals its one-sequence-at-a-time log-probs."""

from __future__ import annotations

import pytest
import torch

from support import tiny
from vold.models.architecture import Architecture
from vold.models.language_model import build_language_model, hidden_states
from vold.models.weights import load_pretrained

LENGTHS = (70, 41, 3)


def logp(logits_TV, ids_T):
    """Of each token but the first."""
    return logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_packed_log_probs_are_transformers_one_by_one_and_its_own_packed_ones_are_not(name, tmp_path, layout):
    reference = tiny.FAMILIES[name]()
    model = build_language_model(
        Architecture.from_pretrained(tiny.save(reference, tmp_path / "c")), layout, torch.float32
    )
    load_pretrained(model, tmp_path / "c")
    rows = [tiny.text_row(length, seed=length) for length in LENGTHS]
    tokens = tiny.pack(rows)
    ours = (hidden_states(model, tokens) @ model.head_weight().T).split(LENGTHS)
    bounds = {"cu_seq_lens_q": tokens.cu_seqlens, "cu_seq_lens_k": tokens.cu_seqlens}
    longest = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        alone = [row.logits(reference) for row in rows]
        packed = reference(tokens.input_ids_T[None], position_ids=positions, use_cache=False, **bounds, **longest)
    theirs = packed.logits[0].split(LENGTHS)
    for number, row in enumerate(rows):
        expected = logp(alone[number], row.ids)
        torch.testing.assert_close(logp(ours[number], row.ids), expected, rtol=0, atol=1e-5)
        is_wrong = (logp(theirs[number], row.ids) - expected).abs().max() > 0.05
        assert is_wrong == (number > 0), "transformers packs these models right now: say so in docs/architectures.md"
