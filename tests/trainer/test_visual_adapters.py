"""LoRA in the vision tower and its mergers: gradients are peft's, whose directories are read and written."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import vision_ranks
from safetensors.torch import load_file

from support import ranks, tiny
from support.steps import OPTIMIZER, relative
from vold.config.schema import AdapterConfig
from vold.data.packing import pack
from vold.models.adapters import PROJECTIONS
from vold.models.peft_directory import adapter_tensors, write_adapter
from vold.models.vision import tower_linears
from vold.models.weights import export_adapters, export_weights
from vold.parallel.launch import initialise, shutdown
from vold.trainer.trainer import Trainer

peft = pytest.importorskip("peft", reason="peft is not installed")
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TARGETS = ("qkv", "proj", "fc1", "fc2", "merger", "tower")
LAYOUTS = {
    "qwen2_5_vl": [dict(tp=2), dict(pp=2, recompute="full")],
    "qwen3_vl": [dict(tp=2, sp=True, recompute="full")],
}
MERGER_LAYOUTS = [dict(tp=2, sp=True), dict(pp=2, vpp=2)]


def adapted(family: str, path, targets=TARGETS):
    """A model of peft with an adapter whose update is not zero, saved to `path`."""
    torch.manual_seed(5)
    model = vision_ranks.reference(family)
    names = [f"visual.{name}" for name in tower_linears(tiny_arch(family)) if ("merger" in name) in wanted(targets)]
    text = [name for target in targets for name in PROJECTIONS.get(target, ())]
    layers = [name for name, _ in model.named_modules() if ".layers." in name and name.rpartition(".")[2] in text]
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=[*names, *layers]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def wanted(targets) -> set[bool]:
    return {target == "merger" for target in targets if target in ("merger", "tower")}


def tiny_arch(family: str):
    from vold.models.architecture import Architecture

    return Architecture.from_config(vision_ranks.reference(family).config)


def expected_gradients(model) -> dict[str, torch.Tensor]:
    """As vision_ranks has them, through peft's wrapper."""
    inner = model.base_model.model
    vision_ranks.expected_nll_and_gradients(inner)
    named = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    return {name: p.grad for name, p in named.items()}


def open_trainer(student, layout, adapter: AdapterConfig) -> Trainer:
    numbers = {"steps": 3, "dtype": torch.float32, "vocab_size": vision_ranks.IDS}
    return Trainer(student, layout, OPTIMIZER, adapter=adapter, **numbers)


def found_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    encode = vision_ranks.Pictures(trainer.chunks[0].arch)
    trainer.accumulate_gradients(pack(vision_ranks.make_samples(), max_tokens=60, encode=encode))
    return {name: tensor.clone() for name, tensor in export_adapters(trainer.chunks, lambda p: p.main_grad)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, targets) -> student, adapter directory, gradients by peft."""
    folder, found = tmp_path_factory.mktemp("adapted"), {}
    for family in FAMILIES:
        student = tiny.save(vision_ranks.reference(family), folder / family)
        for targets in (TARGETS, ("qkv", "merger")):
            path = folder / f"{family}-{len(targets)}"
            found[family, targets] = student, path, expected_gradients(adapted(family, path, targets))
    return found


def config_of(path, targets=TARGETS) -> AdapterConfig:
    return AdapterConfig(rank=3, alpha=6, targets=targets, path=path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [TARGETS, ("qkv", "merger")])
def test_gradients_are_those_of_peft(family, targets, made, layout, tmp_path):
    student, path, expected = made[family, targets]
    trainer = open_trainer(student, layout, config_of(path, targets))
    found = found_gradients(trainer)
    assert found.keys() == expected.keys()
    assert relative(found, expected) <= 1e-5
    assert len(trainer.parameters) == len(found), "nothing else is trained"
    write_adapter(tmp_path / "out", student, config_of(path, targets), export_adapters(trainer.chunks))
    written, stored = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "out", path))
    assert written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing or unexpected tensors
        again = peft.PeftModel.from_pretrained(vision_ranks.reference(family), tmp_path / "out")
        merged = again.merge_and_unload().state_dict()
    for name, tensor in export_weights(trainer.chunks):
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def layouts(made, out) -> None:
    for (family, targets), (student, path, _) in made.items():
        for number, sizes in enumerate(LAYOUTS[family] if targets == TARGETS else MERGER_LAYOUTS):
            trainer = open_trainer(student, initialise(**sizes, seed=0), config_of(path, targets))
            found = found_gradients(trainer)
            if torch.distributed.get_rank() == 0:
                torch.save(found, out / f"{family}-{len(targets)}-{number}")
    shutdown()


def test_layouts_give_the_same(made, tmp_path):
    ranks.run(2, layouts, made, tmp_path, logs=tmp_path / "logs")
    for (family, targets), (_, _, expected) in made.items():
        for number, sizes in enumerate(LAYOUTS[family] if targets == TARGETS else MERGER_LAYOUTS):
            found = torch.load(tmp_path / f"{family}-{len(targets)}-{number}", weights_only=True)
            assert relative(found, expected) <= 1e-5, (family, sizes)


def test_dropout_in_a_recomputed_tower_draws_the_same(made, layout):
    student, path, expected = made["qwen2_5_vl", TARGETS]
    config = config_of(path).model_copy(update={"dropout": 0.3})
    found = [
        found_gradients(open_trainer(student, replace(layout, recompute=recompute), config))
        for recompute in ("none", "full")
    ]
    assert relative(*found) <= 1e-5 and relative(found[0], expected) > 0.1


def test_an_adapter_with_other_targets_is_refused(made):
    _, path, _ = made["qwen3_vl", TARGETS]
    with pytest.raises(ValueError, match=r"adapter.targets is .*qkv"), adapter_tensors(config_of(path, ("qkv",))):
        pass
