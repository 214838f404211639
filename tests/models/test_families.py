"""The registry of architectures: each entry is read, built, loaded, tested; docs/architectures.md is its table.

WRITE=1 python -m pytest tests/models/test_families.py      rewrites the table
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from support import tiny
from vold.config.schema import AdapterConfig
from vold.models.architecture import Architecture
from vold.models.families import FAMILIES, Family
from vold.models.flops import language_model_parameters
from vold.models.language_model import build_language_model
from vold.models.positions import MODEL_CLASSES
from vold.models.vision import TOWERS
from vold.models.weights import export_weights, load_pretrained

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARK = "<!-- the table is written by tests/models/test_families.py -->\n"
FEATURES = {
    "Trained": lambda family: True,
    "Teaches in the trainer": lambda family: True,
    "Teaches by server": lambda family: True,
    "LoRA": lambda family: family.adapters,
    "Expert parallelism": lambda family: False,
    "Context parallelism": lambda family: False,
    "Images": lambda family: family.vision is not None,
    "Starts from GGUF": lambda family: family.gguf is not None,
}


def row(family: Family) -> str:
    marks = ("yes" if has(family) else "–" for has in FEATURES.values())
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


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.joined])
def test_joined_tensors_load_export_and_refuse_adapters(name, tmp_path, layout):
    reference = tiny.FAMILIES[name](tied=False)
    arch = Architecture.from_pretrained(tiny.save(reference, tmp_path / "c"))
    assert language_model_parameters(arch) == sum(p.numel() for p in reference.parameters())
    with pytest.raises(ValueError, match=f"adapter is not supported for {name}: leave it out"):
        build_language_model(arch, layout, torch.float32, adapter=AdapterConfig(rank=4))
    short = tiny.FAMILIES[name](tied=False, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"qkv_proj\.weight has shape .* but config\.json asks for"):
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
