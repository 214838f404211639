"""A miniature world with untrained models and a handful of problems, and configs that point at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "vold" / "miniature" / "configs"


@dataclass(frozen=True)
class World:
    """Paths of one tiny world; `overrides(verb)` point a shipped miniature config at it."""

    root: Path
    student: Path
    teacher: Path
    data: Path

    def overrides(self, verb: str, run_dir: Path) -> list[str]:
        text = f"evaluation.sets.text.path={self.data / 'val_text.json'}"
        image = f"evaluation.sets.image.path={self.data / 'val_image.jsonl'}"
        of = {
            "traces": [f"teacher={self.teacher}", f"data.path={self.data / 'traces_prompts.json'}"],
            "sft": [
                f"student={self.student}",
                f"pair_with={self.teacher}",
                f"data.path={self.data / 'traces_other.jsonl'}",
                "data.layout=prompt-response",
                "steps=3",
                "batch_size=6",
                "optimizer.warmup_steps=1",
            ],
            "rl": [
                f"student={self.student}",
                f"teacher={self.teacher}",
                f"data.path={self.data / 'train.json'}",
                "steps=4",
                "prompts_per_step=4",
                "rollout.responses_per_prompt=3",
                "rollout.max_new_tokens=12",
                "evaluation.every=4",
                "evaluation.sampling.max_new_tokens=8",
                "save_every=2",
                "keep_checkpoints=9",
                "optimizer.warmup_steps=1",
                text,
                image,
            ],
            "eval": [f"checkpoint={self.student}", "evaluation.sampling.max_new_tokens=8", text, image],
        }
        return [f"run_dir={run_dir}", *of[verb]]


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_student_dir, tiny_teacher_dir) -> World:
    from vold.miniature.data import DataSizes, write_data

    root = tmp_path_factory.mktemp("world")
    write_data(root / "data", 0, DataSizes(train=24, traces_prompts=12, traces_other=12, val=6, test=6))
    return World(root, tiny_student_dir, tiny_teacher_dir, root / "data")


@pytest.fixture(scope="session")
def load(world):
    """load(verb, run_dir, *overrides) -> config, as the command line would build it."""
    from vold.config import load_config, schema

    schemas = {
        "traces": schema.TracesConfig,
        "sft": schema.SftConfig,
        "rl": schema.RlConfig,
        "eval": schema.EvalConfig,
    }

    def build(verb: str, run_dir: Path, *overrides: str):
        return load_config(schemas[verb], CONFIGS / f"{verb}.yaml", [*world.overrides(verb, run_dir), *overrides])

    return build


@pytest.fixture(scope="session")
def rl_run(tmp_path_factory, world, layout):
    """One uninterrupted run of four steps that saved after two and four; two updates a step, beta steered by the KL."""
    from vold.config import load_config, schema
    from vold.train.rl import train_rl

    run_dir = tmp_path_factory.mktemp("runs") / "rl"
    overrides = [*world.overrides("rl", run_dir), "minibatches=2", "objective.target_kl=0.01"]
    config = load_config(schema.RlConfig, CONFIGS / "rl.yaml", overrides)
    train_rl(config)
    return config


@pytest.fixture(scope="session", autouse=True)
def console_log() -> None:
    """Information on standard output and warnings on standard error, as on the command line."""
    from vold.io import configure_logging

    configure_logging()


@pytest.fixture
def saved_config():
    return lambda run_dir: yaml.safe_load((run_dir / "config.yaml").read_text())
