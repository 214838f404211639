"""Mixtures of experts: the router's choice, files in every layout that is met, refusals; layouts over several ranks are
in tests/benchmarks/test_parity.py and tests/trainer/test_reshard.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from support import tiny
from vold.config.schema import AdapterConfig
from vold.models.architecture import Architecture, Mixture, check_expert_sizes
from vold.models.checkpoint_dir import export_checkpoint
from vold.models.experts import Router
from vold.models.flops import active_parameters, language_model_parameters
from vold.models.language_model import build_language_model
from vold.models.student import build_student
from vold.models.weights import export_weights, load_pretrained

MIXTURES = ("qwen3_moe", "qwen3_vl_moe")


@pytest.mark.parametrize("reference_class", [Qwen3MoeTopKRouter, Qwen3VLMoeTextTopKRouter])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_chooses_and_weighs_as_transformers_to_the_bit(reference_class, normalised, layout):
    """In bfloat16, of Qwen3-30B-A3B's shape, where two of a token's logits are often equal."""
    if reference_class is Qwen3VLMoeTextTopKRouter and not normalised:
        pytest.skip("Qwen3-VL-MoE always normalises")
    arch = Architecture.from_config(tiny.qwen3_moe().config)
    model = build_language_model(arch, layout, torch.bfloat16)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=2048, num_experts=128, num_experts_per_tok=8, norm_topk_prob=normalised)
    reference = reference_class(config).bfloat16()
    reference.weight.data = (0.02 * torch.randn(128, 2048)).bfloat16()
    router = Router(model.config, Mixture(128, 8, 768, normalised))
    router.weight.data = reference.weight.data
    x_TD = torch.randn(512, 2048).bfloat16()
    _, weight_Tk, expert_Tk = reference(x_TD)
    ours = router(x_TD)
    assert torch.equal(ours[1], expert_Tk)
    assert torch.equal(ours[0], weight_Tk)


def _rewritten(reference, folder, form: str):
    """The checkpoint as transformers saves it, or with all experts of a layer in one tensor, as transformers has them
    in memory, or transposed, as Qwen3-VL-MoE is published."""
    tiny.save(reference, folder)
    if form == "saved":
        return folder
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, tensor in reference.state_dict().items():
        if ".experts." in name:
            kept[name] = (tensor.transpose(1, 2) if form == "transposed" else tensor).contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", ["saved", "packed", "transposed"])
@pytest.mark.parametrize("name", MIXTURES)
def test_files_of_every_form_load_and_are_exported_in_their_own_form(name, form, tmp_path, layout):
    reference = tiny.FAMILIES[name]()
    source = _rewritten(reference, tmp_path / form, form)
    arch = Architecture.from_pretrained(source)
    model = build_language_model(arch, layout, torch.float32)
    load_pretrained(model, source)
    exported, expected = dict(export_weights([model])), reference.state_dict()
    assert {n for n in expected if "visual." not in n} == exported.keys()
    assert all(torch.equal(exported[n], expected[n]) for n in exported)
    target = export_checkpoint(source, tmp_path / "out", ((n, t + 1) for n, t in exported.items()))
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    for n, tensor in before.items():
        assert torch.equal(after[n], tensor if "visual." in n else tensor + 1), n
    if form != "transposed" or name == "qwen3_vl_moe":  # transformers transposes that family's only
        reread = type(reference).from_pretrained(target).state_dict()
        assert all(torch.equal(reread[n], expected[n] + 1) for n in exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is no number of 8 experts"),
    ],
)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_that_are_not_computed_are_refused_by_name(name, changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture.from_config(_config(name, **changes))


def _config(name: str, **changes):
    config = tiny.FAMILIES[name]().config
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    return config


def test_another_number_of_experts_than_the_files_have_is_refused(tmp_path, layout):
    for form in ("saved", "packed"):
        folder = _rewritten(tiny.qwen3_moe(), tmp_path / form, form)
        for experts, message in ((4, "is no part of|has shape"), (16, "is missing|has shape")):
            tiny.qwen3_moe(num_experts=experts).config.save_pretrained(folder)
            arch = Architecture.from_pretrained(folder)
            with pytest.raises(ValueError, match=message):
                load_pretrained(build_language_model(arch, layout, torch.float32), folder)


def test_adapters_of_experts_are_refused_and_those_of_attention_are_not(layout):
    arch = Architecture.from_config(tiny.qwen3_moe().config)
    with pytest.raises(ValueError, match=r"adapter\.targets has fc1, fc2, which qwen3_moe has as experts"):
        build_language_model(arch, layout, torch.float32, adapter=AdapterConfig(rank=4))
    adapter = AdapterConfig(rank=4, targets=("qkv", "proj"))
    model = build_language_model(arch, layout, torch.float32, adapter=adapter)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_sizes_of_experts_need_a_mixture():
    dense, mixture = (Architecture.from_config(tiny.FAMILIES[name]().config) for name in ("qwen3", "qwen3_moe"))
    check_expert_sizes(2, 1, dense, mixture)  # a teacher in the trainer
    check_expert_sizes(1, 1, dense)
    with pytest.raises(ValueError, match=r"parallel\.ep = 2 and etp = 1 divide a mixture's experts and qwen3 has none"):
        check_expert_sizes(2, 1, dense, None)


def test_experts_are_trained_together_or_not_at_all(layout):
    arch = Architecture.from_config(tiny.qwen3_moe().config)
    [chunk] = build_student(arch, layout, torch.float32, train=["layers.1.mlp.experts", "layers.0.mlp.gate"])
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    assert trained == {f"decoder.layers.1.mlp.experts.{x}" for x in ("fc1", "fc2")} | {
        "decoder.layers.0.mlp.router.weight"
    }
    with pytest.raises(ValueError, match="they are one matrix here; take both"):
        build_student(arch, layout, torch.float32, train=["layers.1.mlp.experts.3"])


def test_parameters_that_a_token_meets():
    reference = tiny.qwen3_moe()
    arch = Architecture.from_config(reference.config)
    total = sum(p.numel() for p in reference.parameters())
    idle = sum(p.numel() * 6 // 8 for n, p in reference.named_parameters() if ".experts." in n)
    assert (language_model_parameters(arch), active_parameters(arch)) == (total, total - idle)
