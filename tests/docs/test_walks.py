"""docs/design.md: the files and names of a new reader's walk exist, and no walk opens a file twice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "design.md").read_text().partition("## A new reader's walk")[2].partition("\n## ")[0]
WALKS = dict(re.findall(r"^### (.*)\n((?:.|\n)*?)(?=\n### |\Z)", SECTION, re.MULTILINE))
STOP = re.compile(r"^\d+\. `([^`]+)`: ((?:`[\w.]+`(?:, )?)*)", re.MULTILINE)
PACKAGES = ("vold/", "kernels/vold_kernels/")


def defined_names(path: Path) -> set[str]:
    """Functions, classes and variables of a module, and `Class.member` for what a class body defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= _bound_names(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for child in node.body for member in _bound_names(child)}
    return names


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("walk", WALKS)
def test_files_and_names_exist_and_no_file_comes_twice(walk):
    stops = STOP.findall(WALKS[walk])
    assert len(stops) == len(re.findall(r"^\d+\. ", WALKS[walk], re.MULTILINE)) >= 10
    files = [file for file, _ in stops]
    assert len(set(files)) == len(files)
    for file, names in stops:
        assert (ROOT / file).is_file(), file
        if file.startswith(PACKAGES):
            listed = set(re.findall(r"`([\w.]+)`", names))
            assert listed and not listed - defined_names(ROOT / file), file


def test_there_are_three_walks():
    assert list(WALKS) == ["Prompt → optimizer step", "Config key → kernel", "Weight → engine → checkpoint"]
