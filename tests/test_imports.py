"""Imports go downwards only, without cycles, and heavy engines stay in their packages (docs/design.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"types", "io", "jsonl", "untrusted", "seeding", "processes", "file_errors", "config", "parallel"},
    {"endpoint"},
    {"grading", "objectives"},
    {"data"},
    {"models", "report"},
    {"run"},
    {"trainer", "rollout"},
    {"teacher", "evaluation"},
    {"train"},
    {"selfplay", "planning", "commands"},
    {"api", "cli", "miniature"},
    {"__init__", "__main__"},  # the public names and the command, which import lazily
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
SOURCES = sorted([*ROOT.glob("vold/**/*.py"), *ROOT.glob("kernels/vold_kernels/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts[parts[0] == "kernels" :] if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it: of `from a import b`, a.b where that is a module of ours."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            names |= members & MODULES.keys() or {base}
    return names


def package_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "vold" and len(parts) > 1 else None


def test_every_package_has_its_level():
    assert len(SOURCES) > 100
    assert {path.relative_to(ROOT).with_suffix("").parts[1] for path in ROOT.glob("vold/**/*.py")} <= LEVEL.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path):
    modules = imported_modules(path)
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        assert not any(m.split(".")[0] in ("vold", "megatron", "vllm", "transformers") for m in modules)
        return
    level = LEVEL[relative.with_suffix("").parts[1]]
    for module in modules:
        package = package_of(module)
        assert package is None or LEVEL[package] <= level, f"{relative} imports upwards: {module}"


def test_no_import_cycles():
    graph = {name: imported_modules(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_engines_stay_in_their_packages(path: Path):
    packages = {module.split(".")[0] for module in imported_modules(path)}
    relative = path.relative_to(ROOT)
    if "megatron" in packages:
        assert relative.parts[1] in ("models", "parallel", "trainer")
    if "vllm" in packages:
        assert relative.parts[1] in ("rollout", "teacher")


def test_kernels_has_no_init():
    """A regular package called kernels would shadow the Hugging Face package transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
