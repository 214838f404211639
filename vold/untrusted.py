"""Files that others wrote, read within bounds: of size, of nesting, of what an alias or a name may lead to."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vold.io import visible

JSON_BYTES = 128 * 2**20
"""Largest JSON file read whole; the vocabularies and weight indices of published models have up to 40 MB."""
YAML_BYTES, YAML_NODES = 256 * 2**10, 100_000
"""Largest YAML file, and the most values it may hold where every alias counts as a copy of what it names."""
HEADER_BYTES = 32 * 2**20
"""Longest header of a safetensors file: some 300,000 tensors."""
NAME_BYTES = 255
"""The longest name that file systems take."""


def read_json(path: Path, most_bytes: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises ValueError, one line that names the file, where it is larger than `most_bytes`
    or no JSON; OSError where it cannot be read."""
    check_size(path, most_bytes)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"{path} is not JSON: {' '.join(str(error).split())}") from None


def check_size(path: Path, most_bytes: int) -> None:
    """Raises ValueError, naming the file, where it is too large for its kind, or a pipe or device, which may have no
    end. OSError where there is none."""
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no ordinary file; put one in its place")
    if size > most_bytes:
        raise ValueError(f"{path} has {size} bytes, over the {most_bytes} that are read of its kind")


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe or a device; OSError where there is no file."""
    check_size(path, 1 << 62)


@contextmanager
def as_vold_writes(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the content of one of vold's own files into a ValueError of one line that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, csv.Error) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not as vold writes it ({type(error).__name__}: {reason}); restore it") from None


def check_tensor_header(path: Path) -> None:
    """Raises ValueError for a safetensors file whose header is too long to be read. OSError where there is none."""
    check_regular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"{path} cannot be read: a header of {length} bytes is over {HEADER_BYTES}")


def is_plain_name(name: object) -> bool:
    """Whether a name in an index or a manifest is that of a file beside it, and cannot lead anywhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode(errors="replace")) <= NAME_BYTES
        and not any(separator in name for separator in "/\\")
        and visible(name) == name
    )


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises ValueError, one line that names the file; OSError where it cannot be
    read."""
    check_size(path, YAML_BYTES)
    try:
        return parse_yaml(path.read_bytes().decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-99-99
        reason = " ".join(str(error).split()).replace('"<unicode string>", ', "")
        raise ValueError(f"{path} is not YAML: {reason}") from None


def parse_yaml(text: str | bytes) -> Any:
    """The plain values of YAML text. Raises yaml.YAMLError, ValueError or RecursionError for other text, also for
    aliases that multiply (a "billion laughs") or contain themselves."""
    loader = _BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _BoundedLoader(yaml.SafeLoader):
    """The nodes are counted before values are made of them: a merge key (`<<`) copies what its alias names."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count(node, {}) > YAML_NODES:
            raise yaml.YAMLError(f"its aliases make more than {YAML_NODES} values of it")
        return node


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Nodes at and below `node`, each as often as aliases name it. counts: by id; 0 while a node is being counted."""
    known = counts.get(id(node))
    if known == 0:
        raise yaml.YAMLError("an alias names what contains it")
    if known is not None:
        return known
    counts[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counts[id(node)] = total = 1 + sum(_count(child, counts) for child in children)
    return total
