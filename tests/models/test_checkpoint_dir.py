"""Exporting a trained copy of a checkpoint directory."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
)

from support import tiny
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.language_model import build_language_model, hidden_states, open_vision_tower
from vold.models.weights import export_weights, load_pretrained

CLASSES = {
    "qwen3": Qwen3ForCausalLM,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


def trained(directory, layout):
    """A model, patch mergers included, that is no longer the checkpoint's."""
    model = build_language_model(Architecture.from_pretrained(directory), layout, torch.float32, train_merger=True)
    load_pretrained(model, directory)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one-file", "sharded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CLASSES)
def test_from_pretrained_of_the_export_gives_the_trained_logits(family, tied, options, tmp_path, layout):
    source = tiny.save(tiny.FAMILIES[family](tied=tied), tmp_path / "source", **options)
    model = trained(source, layout)
    target = export_checkpoint(source, tmp_path / "out" / "target", export_weights([model]))
    reference = CLASSES[family].from_pretrained(target).eval()
    rows = [tiny.text_row(6)]
    if model.arch.vision:
        rows.append(tiny.image_row(model.arch, (1, 4, 6)))
    tokens, vision = tiny.pack(rows), open_vision_tower([model], source, torch.float32)
    ours = hidden_states(model, tokens, vision and vision.features(tokens.pictures)) @ model.head_weight().T
    expected = torch.cat([row.logits(reference) for row in rows])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in source.iterdir())


def test_tokenizer_template_and_processor_are_copied(tiny_student_dir, tmp_path):
    target = export_checkpoint(tiny_student_dir, tmp_path / "target", [])
    source_files = {p.name: p.read_bytes() for p in tiny_student_dir.iterdir() if p.suffix != ".safetensors"}
    assert source_files == {p.name: p.read_bytes() for p in target.iterdir() if p.suffix != ".safetensors"}
    assert "preprocessor_config.json" in source_files
    assert AutoTokenizer.from_pretrained(target).chat_template


def test_one_tensor_at_a_time_is_held(tmp_path):
    source = tiny.save(tiny.qwen3(tied=False), tmp_path / "source", max_shard_size="50KB")
    alive = []

    def stream():
        for name, tensor in tiny.qwen3(tied=False).state_dict().items():
            assert sum(reference() is not None for reference in alive) <= 1, "the one just written"
            copy = 2 * tensor
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy

    exported = Qwen3ForCausalLM.from_pretrained(export_checkpoint(source, tmp_path / "target", stream())).state_dict()
    assert all(torch.equal(exported[name], 2 * tensor) for name, tensor in tiny.qwen3(tied=False).state_dict().items())


def test_an_occupied_target_is_refused_and_left_alone(tmp_path):
    source = tiny.save(tiny.qwen3(), tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    export_checkpoint(source, target, [])  # an empty directory may be filled
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="target is not empty"):
        export_checkpoint(source, target, [])
    assert (target / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", (96, 64), r"no tensor model\.layers\.7\.mlp\.up_proj\.weight"),
        ("model.norm.weight", (65,), r"tensor model\.norm\.weight is \(64,\), the new one \(65,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_leaves_nothing_behind(name, shape, message, tmp_path):
    source = tiny.save(tiny.qwen3(), tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(source, tmp_path / "target", [(name, torch.zeros(shape))])
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
