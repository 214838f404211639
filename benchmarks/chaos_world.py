"""What the chaos campaign runs: models, data, the uninterrupted runs, and what counts as the same."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from vold.miniature.data import DataSizes, write_data
from vold.run.run_dir import read_rows

from .chaos_ranks import Inside, Launch

CONFIGS = Path(__file__).parents[1] / "vold" / "miniature" / "configs"
TIMES = ("seconds", "cpu_seconds", "tokens_per_second", "prompts_per_second", "peak_memory", "memory_gib", "rollout_t")
COMMON = ["save_every=2", "keep_checkpoints=3", "optimizer.warmup_steps=1", "timeout_seconds=40", "loggers=[]"]
SFT = ["steps=8", "batch_size=6", "evaluation={}", "pair_with=null", "data.layout=prompt-response"]
RL = [
    "steps=6",
    "prompts_per_step=4",
    "rollout.responses_per_prompt=3",
    "rollout.max_new_tokens=12",
    "evaluation={}",
    "objective.target_kl=0.01",
    "rollout.curriculum={lowest: 0.1, highest: 0.9}",
]
STEERED = ["objective={preset: dcpo, beta: 0.3}", "rollout.lag=1", "minibatches=2"]
KINDS = {"sft": SFT, "rl": RL, "rl-lag1": [*RL[:-2], *STEERED]}
LIMIT = 400.0
"""Seconds after which a launch hangs; a machine with other work is slow."""


class Lost(Exception):
    """The run did not survive; the message says how."""


@dataclass(frozen=True)
class Variant:
    """kind: of KINDS; world: ranks at the start."""

    kind: str
    world: int
    background: bool

    @property
    def verb(self) -> str:
        return self.kind.partition("-")[0]


@dataclass
class World:
    """A folder with models, data, and the uninterrupted runs made so far."""

    root: Path
    references: dict[tuple, Path] = field(default_factory=dict)
    launches: int = 0

    @classmethod
    def make(cls, root: Path) -> World:
        from vold.miniature import models

        for name, config in (("student", models.base_config()), ("teacher", models.teacher_config())):
            models.save_checkpoint(models.new_model(config, seed=0), root / name)
        write_data(root / "data", 0, DataSizes(train=24, traces_prompts=4, traces_other=12, val=2, test=2))
        return cls(root)

    def data_file(self, variant: Variant) -> Path:
        return self.root / "data" / ("train.json" if variant.verb == "rl" else "traces_other.jsonl")

    def inputs(self, variant: Variant) -> list[Path]:
        """The files of models and data that runs of a variant read."""
        models = ("student", "teacher") if variant.verb == "rl" else ("student",)
        return [*(path for name in models for path in sorted((self.root / name).iterdir())), self.data_file(variant)]

    def arguments(self, variant: Variant, run_dir: Path, *extra: str) -> list[str]:
        given = [f"student={self.root / 'student'}", f"data.path={self.data_file(variant)}", f"run_dir={run_dir}"]
        given += [f"teacher={self.root / 'teacher'}"] if variant.verb == "rl" else []
        given += [f"save_async={str(variant.background).lower()}"]
        return [variant.verb, str(CONFIGS / f"{variant.verb}.yaml"), *COMMON, *KINDS[variant.kind], *given, *extra]

    def launch(self, variant: Variant, run_dir: Path, *extra: str, world: int = 0, inside: Inside | None = None):
        self.launches += 1
        folder = self.root / "launches" / f"{self.launches:05d}"
        return Launch(self.arguments(variant, run_dir, *extra), world or variant.world, folder, inside)

    def finish(self, variant: Variant, run_dir: Path, *extra: str, world: int = 0) -> None:
        """Run to the end, undisturbed. Raises Lost where it does not get there."""
        launch = self.launch(variant, run_dir, *extra, world=world)
        if not launch.wait(LIMIT):
            raise Lost("hangs: " + launch.output()[-500:])
        if launch.codes != [0] * (world or variant.world):
            raise Lost(f"exit codes {launch.codes}: {launch.output()[-800:]}")

    def reference(self, variant: Variant, stops: tuple[int, ...]) -> Path:
        """The uninterrupted run; at lag 1 one that was stopped in order after each of `stops`."""
        plain = Variant(variant.kind, variant.world, background=False)
        stops = stops[-1 - stops[::-1].index(0) :][1:] if 0 in stops else stops  # what was before a new start is gone
        key = (plain, stops)
        if key not in self.references:
            run_dir = self.root / "references" / "-".join(map(str, (variant.kind, variant.world, *stops)))
            keep = ["save_every=1", "keep_checkpoints=99"]
            if stops:
                shutil.copytree(self.reference(variant, stops[:-1]), run_dir)
                shutil.rmtree(run_dir / "model")
                (run_dir / "checkpoints" / "latest").write_text(f"step-{stops[-1]:06d}\n")
                for path in (run_dir / "checkpoints").glob("step-*"):
                    if int(path.name[5:]) > stops[-1]:
                        shutil.rmtree(path)
            self.finish(plain, run_dir, *keep, *(["--resume"] if stops else []))
            self.references[key] = run_dir
        return self.references[key]


def compare(found: Path, expected: Path, *, exact: bool, unchecked: tuple[str, ...] = ()) -> None:
    """Raise Lost with the first difference of two finished runs. unchecked: logs that a warning has named."""
    for name in ("metrics.jsonl", "prompts.jsonl", "samples.jsonl"):
        if name in unchecked or not (expected / name).exists():
            continue
        one, other = (_timeless(read_rows(path / name)) for path in (found, expected))
        if [row["step"] for row in one] != [row["step"] for row in other]:
            raise Lost(f"{name}: steps {[row['step'] for row in one]}")
        if exact and one != other:
            differing = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
            keys = [key for key in differing[1] if differing[0].get(key) != differing[1][key]]
            raise Lost(f"{name}: step {differing[0]['step']} differs in {keys[:5]}")
    last = max((found / "checkpoints").glob("step-*")).name
    pairs = [(found / "model", expected / "model")]
    pairs += [(found / "checkpoints" / last, expected / "checkpoints" / last)] if exact else []
    for one, other in pairs:
        for path in sorted(other.glob("*.safetensors")):
            left, right = load_file(one / path.name), load_file(path)
            same = torch.equal if exact else (lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=2e-4))
            if left.keys() != right.keys() or not all(same(left[name], right[name]) for name in right):
                raise Lost(f"{one.name}/{path.name} differs")


def _timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
