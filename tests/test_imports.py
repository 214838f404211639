"""The house's directions: imports go downwards only, and heavy engines stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"config", "records"},
    {"models", "objectives", "data", "grading", "parallel"},
    {"trainer", "rollout", "teacher", "report", "selfplay"},
    {"stages"},
    {"cli", "miniature", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SOURCES = sorted([*ROOT.glob("vold/**/*.py"), *ROOT.glob("kernels/*.py")])


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "vold" and len(parts) > 1 and parts[1] in LEVEL else None


def test_there_is_something_to_walk():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path):
    modules = imported_modules(path)
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        assert not any(m.split(".")[0] in ("vold", "megatron", "vllm", "transformers") for m in modules)
        return
    room = relative.with_suffix("").parts[1]
    if room == "__init__":
        return
    for module in modules:
        target = room_of(module)
        assert target is None or LEVEL[target] <= LEVEL[room], f"{relative} imports upwards: {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_engines_stay_in_their_rooms(path: Path):
    packages = {module.split(".")[0] for module in imported_modules(path)}
    relative = path.relative_to(ROOT)
    if "megatron" in packages:
        assert relative.parts[1] in ("models", "parallel", "trainer")
    if "vllm" in packages:
        assert relative.parts[1] in ("rollout", "teacher")


def test_kernels_has_no_init():
    """A regular package called kernels would shadow the Hugging Face package transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
