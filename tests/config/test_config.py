"""Strict configuration: one line that names the field, the value and the fix."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vold.config import dump_config, load_config
from vold.config.load import RENAMED_KEYS
from vold.config.schema import EvalConfig, ExportConfig, RlConfig, SelfplayConfig, SftConfig, Strict, TracesConfig
from vold.objectives import PRESETS, build_objective

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


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.clip_low=0.1", "unknown key objective.clip_low; it is now objective.clip_eps_low"),
        ("objective.clip_high=0.1", "unknown key objective.clip_high; it is now objective.clip_eps_high"),
        ("visual_reliance_every=5", "unknown key visual_reliance_every; it is now image_sensitivity_every"),
        ("objective.divergence=full", "objective.divergence = 'full': 'full' is now 'reverse_kl'"),
        ("objective.divergence=forward", "objective.divergence = 'forward': 'forward' is now 'forward_kl'"),
    ],
)
def test_an_old_key_or_value_names_the_new_one(rl_yaml, override, says):
    assert message(rl_yaml, override).endswith(f": {says}")


def test_an_old_key_is_known_in_every_section(tmp_path):
    base = ROOT / "configs" / "qwen2.5-vl-3b" / "selfplay-diverse.yaml"
    line = message(base, "solver.objective.clip_low=0.1", schema=SelfplayConfig)
    assert "unknown key solver.objective.clip_low; it is now solver.objective.clip_eps_low" in line
    line = message(base, "not_visual_reliance_every=1", schema=SelfplayConfig)
    assert "unknown key not_visual_reliance_every; " in line and "it is now" not in line


@pytest.mark.parametrize("key", RENAMED_KEYS.values())
def test_new_names_exist(key):
    section = RlConfig
    for part in key.split("."):
        assert part in section.model_fields
        section = section.model_fields[part].annotation


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
        ("minibatches=300", "minibatches = 300 exceeds prompts_per_step = 256; lower it"),
        ("objective.beta_end=1e-3", "objective.beta_end and objective.beta_step belong together"),
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


METHODS, LAUNCH = ROOT / "configs" / "methods", ROOT / "configs" / "launch"
WHOLE = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path.parent not in (METHODS, LAUNCH))


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_are_valid(path):
    stem = path.stem if path.stem in SCHEMAS else path.stem.rpartition("-")[2]  # words-sft
    load_config(SCHEMAS.get(stem, RlConfig), path)


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.yaml")), ids=lambda p: p.stem)
def test_methods_lie_over_a_config(path):
    """What the base says elsewhere stays, and a method with a preset of its name is that preset, number by number."""
    stage, schema = ("sft", SftConfig) if path.stem.endswith("-sft") else ("vold", RlConfig)
    base = ROOT / "configs" / "qwen2.5-vl-3b" / f"{stage}.yaml"
    config = load_config(schema, base, [str(path), "optimizer.lr=7e-7"])
    assert config.optimizer.lr == 7e-7 and config.steps == load_config(schema, base).steps
    if schema is RlConfig:
        found = build_objective(config.objective, config.rollout.max_new_tokens)
        preset = PRESETS[{"x-reasoner": "grpo"}.get(path.stem, path.stem)]
        assert found == replace(preset, max_response_tokens=config.rollout.max_new_tokens)
        assert config.teacher or not found.needs_teacher


def test_a_file_is_laid_over_section_by_section(rl_yaml, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("steps: 9\nrollout: {top_p: 0.5}\nobjective: {preset: gspo}")
    config = load_config(RlConfig, rl_yaml, ["rollout.top_p=0.9", str(over), "steps=10"])
    assert (config.steps, config.rollout.top_p, config.rollout.max_new_tokens) == (10, 0.5, 8)
    assert config.objective.preset == "gspo"
    assert "none.yaml does not exist" in message(rl_yaml, "none.yaml")


@pytest.mark.parametrize(
    ("url", "saved"),
    [
        ("http://user:pass@host:8000", "http://[redacted]@host:8000"),
        ("http://hf_abcdefghijklmnopqrstuv:8000", "http://[redacted]:8000"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    ],
)
def test_saved_configs_hold_no_secrets(rl_yaml, url, saved):
    config = load_config(
        RlConfig, rl_yaml, [f"rollout.vllm.urls=['{url}']", "prompt.system=say sk-abcdefghijklmnopqrst"]
    )
    tree = yaml.safe_load(dump_config(config, "rl"))
    assert tree["rollout"]["vllm"]["urls"] == [saved]
    assert tree["prompt"]["system"] == "say [redacted]"
    assert config.rollout.vllm.urls == (url,)  # the run itself uses it
    assert tree["prompt"]["max_tokens"] == config.prompt.max_tokens and tree["student"] == "s"


def test_keys_that_name_a_secret_lose_their_value():
    class Hidden(Strict):
        hf_token: str = "anything"
        api_key: str = "x"
        password: str = "y"
        max_tokens: int = 7
        tokenizer: str = "path"
        token_kind: str = "bpe"

    tree = yaml.safe_load(dump_config(Hidden(), "rl"))
    assert tree == {
        "verb": "rl",
        "hf_token": "[redacted]",
        "api_key": "[redacted]",
        "password": "[redacted]",
        "max_tokens": 7,
        "tokenizer": "path",
        "token_kind": "bpe",
    }
