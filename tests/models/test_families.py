"""The registry of architectures: each entry is read, built, loaded, tested; docs/architectures.md is its table.

WRITE=1 python -m pytest tests/models/test_families.py      rewrites the table
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from support import tiny
from support.steps import assign_token_weights, batch_of, make_groups, make_trainer
from vold.config.schema import AdapterConfig
from vold.models.adapters import PROJECTIONS
from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import export_checkpoint, short_name
from vold.models.checkpoint_reader import CheckpointReader
from vold.models.families import FAMILIES, Family
from vold.models.flops import active_parameters, language_model_parameters, training_flops
from vold.models.joined import parts_of
from vold.models.language_model import build_language_model
from vold.models.positions import MODEL_CLASSES
from vold.models.student import weight_groups
from vold.models.vision import TOWERS, tower_tensors
from vold.models.weight_rules import LAYER, is_adapter, layer_rules, named_rules, text_tensors
from vold.models.weights import export_weights, load_pretrained
from vold.trainer.checkpoint import Checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARK = "<!-- the table is written by tests/models/test_families.py -->\n"
FEATURES = {
    "Trained": lambda family: True,
    "Teaches in the trainer": lambda family: True,
    "Samples in vLLM": lambda family: "in bf16" if family.hybrid else True,
    "Teaches by server": lambda family: "not tried" if family.hybrid else True,
    "LoRA": lambda family: family.adapters,
    "Expert parallelism": lambda family: family.experts,
    "Context parallelism": lambda family: not family.hybrid,
    "Images": lambda family: family.vision is not None,
    "Starts from GGUF": lambda family: family.gguf is not None,
}


def row(family: Family) -> str:
    marks = ({True: "yes", False: "–"}.get(value := has(family), value) for has in FEATURES.values())
    return f"| `{family.model_type}` | {family.title} | {' | '.join(marks)} |\n"


def test_the_page_has_the_table_of_the_registry():
    head = f"| `model_type` | Models | {' | '.join(FEATURES)} |\n|{' --- |' * (2 + len(FEATURES))}\n"
    text, table = PAGE.read_text().split(MARK)[0], head + "".join(map(row, FAMILIES.values()))
    if os.environ.get("WRITE"):
        PAGE.write_text(text + MARK + table)
    assert PAGE.read_text() == text + MARK + table


def test_every_family_is_among_those_that_the_tests_compare_with_transformers():
    """Weights, logits, gradients, shapes, FLOPs: tests/models goes over tiny.FAMILIES."""
    assert tiny.FAMILIES.keys() == FAMILIES.keys()
    assert TOWERS.keys() == MODEL_CLASSES.keys() == {name for name, family in FAMILIES.items() if family.vision}
    assert None not in (*TOWERS.values(), *MODEL_CLASSES.values()), "a class that transformers does not have"
    for name in FAMILIES:
        assert AutoConfig.for_model(name).model_type == name


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_cover_a_familys_layers_and_its_files_exactly(name, tmp_path, layout):
    """Loading, export, shards, sync and checks go over the rules; a parameter or tensor without one would be lost."""
    reference = tiny.FAMILIES[name]()
    arch = Architecture.from_pretrained(tiny.save(reference, tmp_path / "c"))
    model = build_language_model(arch, layout, torch.float32)
    assert {match[2] for n, _ in model.named_parameters() if (match := LAYER.fullmatch(n))} == {
        key for layer in range(arch.layers) for key in layer_rules(arch, layer)
    }
    names = {short_name(n) for n in reference.state_dict() if "visual." not in n}
    parts = {n: [*parts_of(n, arch)] or [n] for n in names}
    assert {part for n in names for part in parts[n]} | {"lm_head.weight"} == text_tensors(arch)
    assert len({*chain(*weight_groups(arch))} - set(tower_tensors(arch))) == len(text_tensors(arch)) - arch.tied
    with CheckpointReader(tmp_path / "c") as reader:
        reader.check_names(arch)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_that_reads_the_registry_takes_a_family(name, tmp_path, layout):
    """FLOPs, a step, shards, the sync's names, an export. Plan and checks: tests/planning/recipe_plans.py."""
    reference = tiny.FAMILIES[name]()
    source = tiny.save(reference, tmp_path / "c")
    arch, batch = (
        Architecture.from_pretrained(source),
        batch_of(assign_token_weights("grpo", make_groups([[1.0, 0.0]]))),
    )
    flops = sum(training_flops(arch, micro.tokens) for micro in batch.micro_batches)
    tokens = sum(len(micro.tokens.input_ids_T) for micro in batch.micro_batches)
    assert flops > 6 * tokens * (active_parameters(arch) - arch.vocab * arch.hidden * (not arch.tied))
    trainer, other = make_trainer(source, layout, lr=0.01), make_trainer(source, layout, lr=0.01)
    assert trainer.step(batch).metrics["skipped"] == 0
    checkpoints = Checkpoints(tmp_path / "run", layout, keep=1)
    checkpoints.save(trainer, 1)
    checkpoints.load(other, 1)
    trained, loaded = (dict(x.weights()) for x in (trainer, other))
    sampled = {n for n, _ in reference.named_parameters(remove_duplicate=False) if "visual." not in n}
    assert trained.keys() == loaded.keys() == sampled, "a sampler knows each weight by its name, and gets each"
    assert all(torch.equal(loaded[n], trained[n]) for n in trained)
    exported = (
        type(reference).from_pretrained(export_checkpoint(source, tmp_path / "out", trainer.weights())).state_dict()
    )
    assert all(torch.equal(exported[n], trained[n]) for n in trained)
    assert any(not torch.equal(exported[n], reference.state_dict()[n]) for n in trained), "it was trained"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.adapters])
def test_adapters_have_the_projections_of_a_family_that_peft_adapts(name, layout):
    reference = tiny.FAMILIES[name]()
    arch = Architecture.from_config(reference.config)
    targets = ("qkv", "proj") if arch.mixture else tuple(PROJECTIONS)
    model = build_language_model(arch, layout, torch.float32, adapter=AdapterConfig(rank=4, targets=targets))
    adapted = {rule.names[0].split(".lora_")[0] for _, _, rule in named_rules(model) if is_adapter(rule)}
    modules = {n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear) and "visual." not in n}
    projections = {x for target in targets for x in PROJECTIONS[target]}
    assert adapted == {short_name(n) for n in modules if n.split(".")[-1] in projections}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.joined])
def test_joined_tensors_load_export_and_refuse_adapters(name, tmp_path, layout):
    reference = tiny.FAMILIES[name](tied=False)
    arch = Architecture.from_pretrained(tiny.save(reference, tmp_path / "c"))
    text = [p.numel() for n, p in reference.named_parameters() if "visual." not in n]
    assert language_model_parameters(arch) == sum(text)
    with pytest.raises(ValueError, match=f"adapter is not supported for {name}: leave it out"):
        build_language_model(arch, layout, torch.float32, adapter=AdapterConfig(rank=4))
    heads = "linear_num_key_heads" if arch.delta_net else "num_key_value_heads"
    short = tiny.FAMILIES[name](tied=False, **{heads: 1})
    with pytest.raises(ValueError, match=r"(qkv_proj|conv1d)\.weight has shape .* but config\.json asks"):
        tiny.save(short, tmp_path / "short")
        reference.config.save_pretrained(tmp_path / "short")
        load_pretrained(build_language_model(arch, layout, torch.float32), tmp_path / "short")


def test_a_joined_tensor_in_a_family_that_has_none_is_refused(tmp_path, layout):
    """transformers would leave a Phi's tensors out of a Llama and draw new ones."""
    tiny.save(tiny.phi3(), tmp_path / "c")
    tiny.llama(head_dim=16).config.save_pretrained(tmp_path / "c")
    arch = Architecture.from_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="is no part of the llama"):
        load_pretrained(build_language_model(arch, layout, torch.float32), tmp_path / "c")


def test_a_joined_checkpoint_in_bfloat16_comes_back_bit_for_bit(tmp_path, layout):
    reference = tiny.phi3(tied=False).bfloat16()
    arch = Architecture.from_pretrained(tiny.save(reference, tmp_path / "c"))
    model = build_language_model(arch, layout, torch.bfloat16)
    load_pretrained(model, tmp_path / "c")
    exported, expected = dict(export_weights([model])), reference.state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
