"""A checkpoint directory with anything in its files: a model's facts, or one line that names the directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vold.models.architecture import Architecture
from vold.models.checkpoint_reader import CheckpointReader
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import load_tokenizer

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def directory(tiny_student_dir, tmp_path_factory) -> Path:
    """A copy that tests damage, and put back."""
    return shutil.copytree(tiny_student_dir, tmp_path_factory.mktemp("damaged") / "model")


def one_line(read, directory: Path) -> None:
    try:
        read(directory)
    except ValueError as error:
        assert str(directory) in str(error) and len(str(error).splitlines()) == 1, str(error)


def with_file(directory: Path, name: str, content: bytes, read) -> None:
    before = (directory / name).read_bytes() if (directory / name).exists() else None
    (directory / name).write_bytes(content)
    try:
        one_line(read, directory)
    finally:
        (directory / name).unlink() if before is None else (directory / name).write_bytes(before)


def read_tensor(directory: Path) -> None:
    with CheckpointReader(directory) as reader:
        reader.check_shape("norm.weight", (128,))


READERS = {
    "config.json": Architecture.from_pretrained,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "preprocessor_config.json": load_prompt_encoder,
    "model.safetensors.index.json": read_tensor,
    "model.safetensors": read_tensor,
}


@FUZZ
@given(
    name=st.sampled_from(sorted(READERS)),
    content=st.binary(max_size=60) | ANYTHING.map(lambda x: json.dumps(x).encode()),
)
def test_any_content(directory, name, content):
    with_file(directory, name, content, READERS[name])


@FUZZ
@given(name=st.sampled_from(sorted(READERS)), share=st.floats(0, 1, exclude_max=True))
def test_cut_off_anywhere(directory, name, share):
    if (directory / name).exists():
        whole = (directory / name).read_bytes()
        with_file(directory, name, whole[: int(share * len(whole))], READERS[name])


def leaves(tree: dict, path: tuple = ()) -> list[tuple]:
    found = []
    for key, value in tree.items():
        found += [(*path, key), *(leaves(value, (*path, key)) if isinstance(value, dict) else [])]
    return found


@FUZZ
@given(choice=st.randoms(use_true_random=False), value=ANYTHING)
def test_any_value_in_config_json(directory, choice, value):
    tree = json.loads((directory / "config.json").read_text())
    *sections, key = choice.choice(leaves(tree))
    section = tree
    for name in sections:
        section = section[name]
    section[key] = value
    with_file(directory, "config.json", json.dumps(tree).encode(), Architecture.from_pretrained)


def test_as_it_is(directory):
    for read in READERS.values():
        read(directory)
