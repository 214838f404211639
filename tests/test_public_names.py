"""`import vold`: instant, lazy, complete; and `vold.load_config`, which chooses the schema by what a file holds."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vold
from vold.config import schema

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs" / "qwen2.5-vl-3b"
MINIATURE = ROOT / "vold" / "miniature" / "configs"
HEAVY = ("torch", "transformers", "triton", "megatron", "pydantic", "yaml", "numpy", "typer")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_instant():
    """`import vold` loads nothing but itself and importlib."""
    code = (
        "import sys, json; before = set(sys.modules); import vold; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(run_python(code))
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []
    assert len(loaded) < 20 and [name for name in loaded if name.startswith("vold.")] == []


def test_reading_a_config_loads_no_torch():
    code = "import sys, vold; vold.load_config(sys.argv[1]); assert 'torch' not in sys.modules"
    file = MINIATURE / "rl.yaml"
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=120, cwd=ROOT)


def test_every_public_name_resolves_and_is_listed():
    assert set(vold.__all__) <= set(dir(vold))
    for name in vold.__all__:
        assert getattr(vold, name).__doc__, name
    assert vold.__version__ == version("vold")
    assert vold.PRESETS["vold"] == vold.build_objective(schema.ObjectiveConfig(), 0)
    assert isinstance(vold.PRESETS["grpo"], vold.Objective)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vold' has no attribute 'train_dpo'"):
        _ = vold.train_dpo


def test_type_checkers_see_the_lazy_names():
    """The imports under TYPE_CHECKING name the same modules as the lazy table."""
    tree = ast.parse((ROOT / "vold" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == vold._MODULES
    assert sorted([*vold._MODULES, "__version__"]) == sorted(vold.__all__)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (SHIPPED / "traces.yaml", schema.TracesConfig),
        (SHIPPED / "sft.yaml", schema.SftConfig),
        (SHIPPED / "vold.yaml", schema.RlConfig),
        (SHIPPED / "geometry3k.yaml", schema.RlConfig),
        (SHIPPED / "eval.yaml", schema.EvalConfig),
        (SHIPPED / "export.yaml", schema.ExportConfig),
        (SHIPPED / "selfplay-diverse.yaml", schema.SelfplayConfig),
        *((MINIATURE / name, schema.RlConfig) for name in ("rl.yaml", "images.yaml")),
        *((MINIATURE / name, schema.SelfplayConfig) for name in ("selfplay.yaml", "selfplay-diverse.yaml")),
        (MINIATURE / "traces.yaml", schema.TracesConfig),
        (MINIATURE / "sft.yaml", schema.SftConfig),
        (MINIATURE / "eval.yaml", schema.EvalConfig),
    ],
    ids=lambda value: f"{value.parent.name}/{value.name}" if isinstance(value, Path) else value.__name__,
)
def test_load_config_chooses_the_schema_by_content(file, expected):
    assert type(vold.load_config(file)) is type(vold.load_config(str(file))) is expected


def test_load_config_applies_overrides_in_order():
    laid_over = ROOT / "configs" / "methods" / "grpo.yaml"
    config = vold.load_config(MINIATURE / "rl.yaml", "objective.beta=0.1", laid_over, "steps=3", "optimizer.lr=1e-5")
    assert config.objective.preset == "grpo" and config.objective.beta == 0.1
    assert (config.steps, config.optimizer.lr) == (3, 1e-5)


def test_load_config_with_a_schema():
    assert type(vold.load_config(MINIATURE / "rl.yaml", schema=schema.RlConfig)) is schema.RlConfig
    with pytest.raises(ValueError, match="unknown key"):
        vold.load_config(MINIATURE / "rl.yaml", schema=schema.SftConfig)


def test_load_config_refuses_in_one_line(tmp_path):
    (tmp_path / "odd.yaml").write_text("run_dir: runs/odd\n")
    for arguments, line in [
        ((tmp_path / "odd.yaml",), "give schema="),
        ((tmp_path / "absent.yaml",), "does not exist"),
        ((MINIATURE / "rl.yaml", "stepz=3"), "unknown key stepz; did you mean steps?"),
        ((MINIATURE / "rl.yaml", "steps"), "not of the form key=value"),
    ]:
        with pytest.raises(ValueError, match=line.replace("?", r"\?")) as error:
            vold.load_config(*arguments)
        assert "\n" not in str(error.value)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_block(block: str, tmp_path: Path, **names) -> SimpleNamespace:
    file = tmp_path / "block.py"
    file.write_text(block)
    return SimpleNamespace(**runpy.run_path(str(file), init_globals=names))


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_pages_train_from_python(page, tmp_path, monkeypatch):
    trained = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(vold, "train_rl", trained.append, raising=False)
    block = next(block for block in python_blocks(page) if "import vold\n" in block)
    assert trained == [run_block(block, tmp_path).config] and type(trained[0]) is schema.RlConfig


def test_the_loss_of_a_trainer_of_ones_own(tmp_path):
    """The block with the fused loss, on [N] terms: at ratio 1 the gradient is that of advantage and k2 pull."""
    hidden = torch.randn(6, 8, requires_grad=True)
    model = SimpleNamespace(lm_head=torch.nn.Linear(8, 11, bias=False))
    target, advantage, weight = torch.randint(0, 11, (6,)), torch.randn(6), torch.full((6,), 1 / 6)
    logp = model.lm_head(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    logp_teacher = logp.detach() + 0.5
    expected = torch.autograd.grad((weight * (-advantage * logp + 0.5 * (logp - logp_teacher) ** 2)).sum(), hidden)[0]
    names = {"hidden": hidden, "model": model, "target": target, "advantage": advantage, "logp_old": logp.detach()}
    names |= {"logp_teacher": logp_teacher, "pg_weight": weight, "kl_weight": weight}
    run_block(next(block for block in python_blocks("docs/api.md") if "PolicyTerms" in block), tmp_path, **names)
    assert torch.allclose(hidden.grad, expected, rtol=1e-4, atol=1e-6)


def test_train_and_evaluate_from_python(world, layout, tmp_path):
    """The whole way in five lines: SFT, RL from its model, accuracy of the result."""

    def overrides(stage: str) -> list[str]:
        return world.overrides(stage, tmp_path / stage)

    vold.train_sft(vold.load_config(MINIATURE / "sft.yaml", *overrides("sft"), "steps=1", "optimizer.warmup_steps=0"))
    start = f"student={tmp_path / 'sft' / 'model'}"
    rl = vold.load_config(MINIATURE / "rl.yaml", *overrides("rl"), start, "steps=1", "optimizer.warmup_steps=0")
    vold.train_rl(rl)
    assert "reward" in json.loads((tmp_path / "rl" / "metrics.jsonl").read_text())
    checkpoint = f"checkpoint={tmp_path / 'rl' / 'model'}"
    vold.evaluate(vold.load_config(MINIATURE / "eval.yaml", *overrides("eval"), checkpoint))
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text())["sets"]["text"]["n"] == 6
