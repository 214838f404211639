"""Habits of other trainers: their keys are refused with ours, and their short values are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from vold.config import load_config
from vold.config.load import HABITS, _dotted_keys
from vold.config.schema import RlConfig, SftConfig
from vold.models.architecture import Architecture
from vold.models.tokenizer import load_tokenizer

TEXT = "{run_dir: r, student: s, data: {path: d, layout: orz}, steps: 1, optimizer: {lr: 1e-5}, "


@pytest.fixture
def rl(tmp_path) -> Path:
    (tmp_path / "rl.yaml").write_text(TEXT + "rollout: {max_new_tokens: 8}}")
    return tmp_path / "rl.yaml"


@pytest.fixture
def sft(tmp_path) -> Path:
    (tmp_path / "sft.yaml").write_text(TEXT + "}")
    return tmp_path / "sft.yaml"


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("epochs=3", "a run has steps"),
        ("num_train_epochs=3", "a run has steps"),
        ("learning_rate=1e-5", "optimizer.lr"),
        ("optimizer.learning_rate=1e-5", "optimizer.lr"),
        ("gradient_checkpointing=true", "parallel.recompute"),
        ("lora.rank=16", "it is adapter={rank: 16"),
        ("report_to=wandb", "loggers"),
        ("num_generations=8", "rollout.responses_per_prompt"),
        ("rollout.num_generations=8", "rollout.responses_per_prompt"),
        ("beta=0.1", "objective.beta"),
        ("model=x", "student"),
        ("output_dir=x", "run_dir"),
        ("bf16=true", "dtype=bfloat16"),
        ("step=10", "did you mean steps"),
        ("optimizer.betass=1", "did you mean betas"),
    ],
)
def test_a_key_of_another_trainer_is_refused_with_ours(rl, sft, override, advice):
    for schema, path in ((RlConfig, rl), (SftConfig, sft)):
        if schema is SftConfig and "rollout." in override:
            continue
        with pytest.raises(ValueError, match="unknown key") as error:
            load_config(schema, path, [override])
        assert advice in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_advice_names_keys_that_there_are():
    keys = {part for schema in (RlConfig, SftConfig) for part in _dotted_keys(schema)}
    named = {
        word.strip(",;:") for advice in HABITS.values() for word in advice.replace("=", " ").split() if "." in word
    }
    sections = {
        word for word in named if word.split(".")[0] in ("optimizer", "rollout", "objective", "parallel", "prompt")
    }
    assert sections and sections <= keys, sections - keys


def test_short_values_are_read(rl):
    config = load_config(RlConfig, rl, ["dtype=bf16", "loggers=wandb"])
    assert (config.dtype, config.loggers) == ("bfloat16", ("wandb",))
    assert load_config(RlConfig, rl, ["dtype=fp32", "loggers=[wandb, tensorboard]"]).loggers == ("wandb", "tensorboard")
    with pytest.raises(ValueError, match="dtype = 'float16'"):
        load_config(RlConfig, rl, ["dtype=float16"])


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_no_number_is_infinite(rl, value):
    with pytest.raises(ValueError, match=r"optimizer\.lr = "):
        load_config(RlConfig, rl, [f"optimizer.lr={value}"])


def test_a_name_on_the_hub_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for read in (load_tokenizer, Architecture.from_pretrained):
        with pytest.raises(ValueError, match=r"`hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIR`"):
            read("Qwen/Qwen2.5-VL-3B-Instruct")
        with pytest.raises(ValueError, match="give the directory of a Hugging Face checkpoint"):
            read("checkpoints/none")
