"""Names, layouts and errors of the Hugging Face <-> Megatron weight table."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import tiny
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.language_model import build_language_model
from vold.models.weights import export_weights, load_pretrained


def loaded(directory, layout, dtype=torch.float32):
    model = build_language_model(Architecture.from_pretrained(directory), layout, dtype)
    load_pretrained(model, directory)
    return model


def rewrite(directory, rename=lambda name: name, drop=(), change=None):
    """Edit a single-file checkpoint in place."""
    path = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file({**tensors, **(change or {})}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_load_then_export_is_bit_equal_and_complete(family, tied, tmp_path, layout):
    reference = tiny.FAMILIES[family](tied=tied)
    exported = dict(export_weights([loaded(tiny.save(reference, tmp_path / "c"), layout)]))
    expected = {k: v for k, v in reference.state_dict().items() if "visual" not in k}
    assert exported.keys() == expected.keys()
    assert "lm_head.weight" in exported
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_names_load_strictly_into_transformers(family, tmp_path, layout):
    reference = tiny.FAMILIES[family](tied=False)
    exported = {name: t.clone() for name, t in export_weights([loaded(tiny.save(reference, tmp_path / "c"), layout)])}
    rest = {k: v for k, v in reference.state_dict().items() if "visual" in k}
    other = tiny.perturbed(type(reference), reference.config, seed=9)
    other.load_state_dict({**exported, **rest}, strict=True)
    ids = tiny.text_row(6).ids[None]
    assert torch.equal(other(ids).logits, reference(ids).logits)


SPELLINGS = {
    "state_dict": lambda n: n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n,
    "old_vl": lambda n: n if n.startswith("visual") else f"language_model.{n}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_loads(spelling, tmp_path, layout):
    reference = tiny.qwen2_5_vl(tied=False)
    directory = tiny.save(reference, tmp_path / "c")
    expected = dict(export_weights([loaded(directory, layout)]))
    rewrite(directory, rename=SPELLINGS[spelling])
    found = dict(export_weights([loaded(directory, layout)]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named(tmp_path, layout):
    reference = tiny.qwen3()
    directory = tiny.save(reference, tmp_path / "c", max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    exported = dict(export_weights([loaded(directory, layout)]))
    assert all(torch.equal(exported[name], tensor) for name, tensor in reference.state_dict().items())
    shard = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    (directory / shard).unlink()
    with pytest.raises(ValueError, match=shard):
        loaded(directory, layout)


def test_bfloat16_weights_round_trip(tmp_path, layout):
    reference = tiny.qwen3().bfloat16()
    exported = dict(export_weights([loaded(tiny.save(reference, tmp_path / "c"), layout, torch.bfloat16)]))
    assert all(torch.equal(exported[name], tensor) for name, tensor in reference.state_dict().items())


def test_missing_and_misshapen_tensors_are_named(tmp_path, layout):
    name = "model.layers.1.mlp.up_proj.weight"
    missing = tiny.save(tiny.qwen3(), tmp_path / "missing")
    rewrite(missing, drop=(name,))
    with pytest.raises(ValueError, match=r"missing: tensor layers\.1\.mlp\.up_proj\.weight is missing"):
        loaded(missing, layout)
    misshapen = tiny.save(tiny.qwen3(), tmp_path / "misshapen")
    rewrite(misshapen, change={name: torch.zeros(96, 32)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} has shape \(96, 32\).*\(96, 64\)"):
        loaded(misshapen, layout)


def test_an_untied_head_must_exist_and_a_tied_one_is_not_read(tmp_path, layout):
    untied = tiny.save(tiny.qwen3(tied=False), tmp_path / "untied")
    rewrite(untied, drop=("lm_head.weight",))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        loaded(untied, layout)
    model = loaded(tiny.save(tiny.qwen3(tied=True), tmp_path / "tied"), layout)
    assert model.head_weight() is model.embedding.word_embeddings.weight


HEAD = "lm_head.weight"
STRANGERS = {
    "a bias that config.json lacks": (
        "model.layers.0.self_attn.q_proj.bias",
        torch.ones(128),
        "q_proj.bias is no part",
    ),
    "a layer beyond the last": ("model.layers.2.mlp.down_proj.weight", torch.ones(64, 96), "layers.2.mlp"),
    "a reward model's head": ("score.weight", torch.ones(1, 64), "score.weight is no part of the llama of 2 layers"),
    "fp8 scales": ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1), "weight_scale_inv"),
    "a head of its own beside tied": (HEAD, torch.ones(tiny.VOCAB, 64), "differs from the embedding"),
    "a tied head of another size": (HEAD, torch.ones(tiny.VOCAB - 1, 64), "differs from the embedding"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_tensor_that_the_model_would_leave_out_is_refused(case, tmp_path, layout):
    name, tensor, message = STRANGERS[case]
    directory = tiny.save(tiny.llama(), tmp_path / "c")
    rewrite(directory, change={name: tensor})
    with pytest.raises(ValueError, match=message) as error:
        loaded(directory, layout)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_layers_for_several_tokens_at_once_are_left_as_they_are(tmp_path, layout):
    """Published Qwen3.5 have them; transformers leaves them out too. Another family's are refused."""
    source = tiny.save(tiny.qwen3_5_text(), tmp_path / "c")
    extra = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 5)}
    rewrite(source, change=extra)
    weights = export_weights([loaded(source, layout)])
    target = export_checkpoint(source, tmp_path / "out", ((name, tensor + 1) for name, tensor in weights))
    before, after = (load_file(path / "model.safetensors") for path in (source, target))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor if name in extra else tensor + 1), name
    other = tiny.save(tiny.qwen3(), tmp_path / "other")
    rewrite(other, change=extra)
    with pytest.raises(ValueError, match=r"mtp\.layers\.0\.mlp\.up_proj\.weight is no part of the qwen3"):
        loaded(other, layout)


def test_tensors_that_say_nothing_new_are_read_past(tmp_path, layout):
    """A stored copy of a tied embedding, and the rotary buffer of checkpoints of 2023."""
    reference = tiny.llama()
    directory = tiny.save(reference, tmp_path / "c")
    embedding = reference.state_dict()["model.embed_tokens.weight"].clone()
    rewrite(directory, change={HEAD: embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    found = dict(export_weights([loaded(directory, layout)]))
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.state_dict().items())


def test_quantised_weights_are_refused(tmp_path, layout):
    directory = tiny.save(tiny.llama(), tmp_path / "c")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(directory / "model.safetensors")[name]
    rewrite(directory, change={name: weight.to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"up_proj\.weight is F8_E4M3, quantised"):
        loaded(directory, layout)
