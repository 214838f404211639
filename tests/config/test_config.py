"""Strict configuration: one line that names the field, the value and the fix."""

from pathlib import Path

import pytest
import yaml

from vold.config import dump_config, load_config
from vold.config.schema import EvalConfig, ExportConfig, RlConfig, SelfplayConfig, SftConfig, TracesConfig

ROOT = Path(__file__).parents[2]
RL = {
    "run_dir": "runs/x",
    "student": "s",
    "teacher": "t",
    "data": {"path": "d.json", "layout": "orz"},
    "steps": 2,
    "rollout": {"max_new_tokens": 8},
    "optimizer": {"lr": 1e-5},
}


@pytest.fixture
def rl_yaml(tmp_path):
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump(RL))
    return path


def message(path, *overrides, schema=RlConfig):
    with pytest.raises(ValueError) as error:
        load_config(schema, path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_are_typed_and_dotted(rl_yaml):
    config = load_config(RlConfig, rl_yaml, ["optimizer.lr=3e-6", "objective.preset=opd", "rollout.top_p=0.9"])
    assert (config.optimizer.lr, config.objective.preset, config.rollout.top_p) == (3e-6, "opd", 0.9)


def test_unknown_key_suggests_the_nearest(rl_yaml):
    assert "unknown key rollout.temprature; did you mean temperature?" in message(rl_yaml, "rollout.temprature=1")


def test_wrong_type_names_field_and_value(rl_yaml):
    assert "steps = 'many': input should be a valid integer" in message(rl_yaml, "steps=many")


def test_missing_key_names_it_and_the_fix(rl_yaml):
    rl_yaml.write_text(yaml.safe_dump({k: v for k, v in RL.items() if k != "steps"}))
    assert "steps is missing; add it or give steps=VALUE" in message(rl_yaml)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "is not of the form key=value"),
        ("steps.deep=1", "steps is a value, not a section"),
        ("rollout.temperature=0", "gives identical responses; use a value > 0"),
        ("rollout.top_p=1.5", "rollout.top_p = 1.5: input should be less than or equal to 1"),
        ("data.layout=orzz", "data.layout = 'orzz'"),
        ("parallel.tp=0", "parallel.tp = 0"),
        ("student={a: [", "is not a YAML value"),
    ],
)
def test_bad_overrides(rl_yaml, override, says):
    assert says in message(rl_yaml, override)


def test_file_mistakes(tmp_path):
    assert "does not exist" in message(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,")
    assert "is not YAML" in message(bad)
    bad.write_text("- 1\n- 2")
    assert "must hold a mapping" in message(bad)


def test_dumped_config_loads_again(rl_yaml, tmp_path):
    config = load_config(RlConfig, rl_yaml)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config, "rl"))
    assert load_config(RlConfig, again) == config


SCHEMAS = {
    "traces": TracesConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "vold": RlConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "selfplay": SelfplayConfig,
    "selfplay-diverse": SelfplayConfig,
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_are_valid(path):
    stem = path.stem if path.stem in SCHEMAS else "rl"
    load_config(SCHEMAS[stem], path)
