"""pyproject.toml declares what vold and vold_kernels import and nothing else; the files of pins agree with it."""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from pins import PROJECT, ROOT, declared, pins

# Distributions by import name, where nothing installed may tell: the extras' packages.
OPTIONAL = {"flash_attn": "flash-attn", "vllm": "vllm", "wandb": "wandb", "trackio": "trackio"}
# Not ours to declare: found where it is installed, or refused (planning/machine.py), never needed.
FOREIGN = {"vlmeval", "transformer_engine", "apex", "flash_attn_interface", "bitsandbytes", "fla"}
# Declared for what a library needs in turn: torch.utils.tensorboard.
INDIRECT = {"tensorboard"}
# Extras of tools and tests, which the package itself never imports.
TOOLS = ("dev",)


def imported_names(path: Path) -> set[str]:
    """Top-level packages of every import in a file, wherever it stands, and of every import_module("name")."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"vold", "vold_kernels"}


@cache
def imported_distributions() -> dict[str, str]:
    """Canonical distribution name -> one file that imports it."""
    distributions = {name: owners[0] for name, owners in packages_distributions().items()} | OPTIONAL
    files: dict[str, str] = {}
    for path in sorted([*ROOT.glob("vold/**/*.py"), *ROOT.glob("kernels/vold_kernels/**/*.py")]):
        for name in imported_names(path) - FOREIGN:
            files[canonicalize_name(distributions.get(name, name))] = str(path.relative_to(ROOT))
    assert {"torch", "triton", "megatron-core", "vllm"} <= files.keys()
    return files


def test_every_import_is_declared():
    needed = declared(tuple(set(PROJECT["optional-dependencies"]) - set(TOOLS)))
    assert {name: file for name, file in imported_distributions().items() if name not in needed} == {}


def test_every_declared_package_is_imported():
    needed = declared(tuple(set(PROJECT["optional-dependencies"]) - set(TOOLS))).keys()
    assert needed - imported_distributions().keys() - INDIRECT == set()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_pins_are_within_what_is_declared(file):
    versions = pins(file)
    for name, requirements in declared().items():
        for requirement in requirements if name in versions else ():
            assert requirement.specifier.contains(versions[name]), f"{file}: {requirement} and {versions[name]}"


@pytest.mark.parametrize(
    ("file", "differ"),
    [
        ("constraints-vllm.txt", {"numpy", "setuptools", "cuda-bindings"}),  # held back by vLLM
        ("tests/vllm/requirements.txt", {"numpy", "setuptools"}),
    ],
)
def test_pins_agree(file, differ):
    main, other = pins("constraints.txt"), pins(file)
    assert {name for name in main.keys() & other.keys() if main[name] != other[name]} <= differ
