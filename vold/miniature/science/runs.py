"""One run of a part, from its start to its JSON: trained, tested once, and reduced to what the statistics need."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from vold.config import load_config, schema
from vold.evaluation.evaluator import evaluate
from vold.io import log, write_atomically
from vold.miniature.demo import commit, versions
from vold.miniature.pipeline import CONFIGS
from vold.miniature.science.protocol import START, Part, Start, Training, result_path
from vold.miniature.science.results import pack
from vold.miniature.selfplay import bank_facts, write_start_rows
from vold.miniature.worlds import WorldKeys, world_paths, world_root
from vold.run.job import free_device_memory
from vold.run.run_dir import read_rows
from vold.selfplay.loop import run_selfplay
from vold.train.rl import train_rl
from vold.train.sft import train_sft
from vold.train.teacher_traces import generate_traces
from vold.types import Diverged

BULKY = ("checkpoints", "model")
METRICS = "metrics.jsonl"
COST_FILE = "cost.json"  # of a start, beside its model


@dataclass(frozen=True)
class Verb:
    """How a part's trainings are called and where a config has their length and rate."""

    train: Callable[..., None]
    config: type[schema.RunConfig]
    steps: str
    rate: str


VERBS = {
    "rl": Verb(train_rl, schema.RlConfig, "steps", "optimizer.lr"),
    "selfplay": Verb(run_selfplay, schema.SelfplayConfig, "iterations", "solver.optimizer.lr"),
}


def start_path(root: Path, world: WorldKeys, start: Start, seed: int) -> Path:
    """The model that SFT leaves for a seed; a start of 0 steps is the base."""
    if start.steps == 0:
        return world_paths(root, world).base
    rows = "all" if start.traces is None else start.traces
    name = f"sft{start.steps}-{start.style}{rows}" + (f"-questions{start.questions}" if start.questions else "")
    return _shared(root, world) / name / f"seed{seed}" / "model"


def make_traces(root: Path, world: WorldKeys) -> None:
    """The teacher's traces of a world, once."""
    run_dir = _shared(root, world) / "traces"
    if not (run_dir / "traces" / "card.json").exists():
        paths = world_paths(root, world)
        settings = (f"teacher={paths.teacher}", f"data.path={paths.traces_prompts}")
        _call(generate_traces, schema.TracesConfig, "traces.yaml", settings, run_dir)


def make_start(root: Path, world: WorldKeys, start: Start, seed: int) -> None:
    """SFT from a world's base, once; its CPU seconds lie beside it."""
    model = start_path(root, world, start, seed)
    if model.exists():
        return
    before, paths, run_dir = _cpu_seconds(), world_paths(root, world), model.parent
    traces = _shared(root, world) / "traces" / "traces"
    data = (f"data.path={traces}",)
    if start.style == "other":
        data = (f"data.path={paths.traces_other}", "data.layout=prompt-response")
    elif start.questions:
        rows = write_start_rows(run_dir.with_suffix(".jsonl"), traces, start.questions, start.traces)
        data = (f"data.path={rows}", "data.layout=prompt-response")
    limit = "null" if start.traces is None or start.questions else start.traces
    settings = (f"student={paths.base}", f"pair_with={paths.teacher}", *data, f"data.limit={limit}")
    _call(train_sft, schema.SftConfig, "sft.yaml", (*settings, f"steps={start.steps}", f"seed={seed}"), run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    write_atomically(run_dir / COST_FILE, json.dumps({"cpu_seconds": _cpu_seconds() - before}) + "\n")


def run_training(root: Path, part_file: Path, part: Part, training: Training) -> None:
    """Train, test where the run counts, and write the result; of a run that diverged, its message. Anything else that
    ends it is raised. Raises ValueError where there is a result of other settings."""
    path, digest = result_path(root, part_file, training), design(part, training)
    if path.exists():
        if json.loads(path.read_text()).get("design", digest) != digest:  # those of before have none
            raise ValueError(
                f"{path} is a run of other settings than {part_file} has now; remove it, or rename the part"
            )
        return
    run_dir, before = path.with_suffix(""), _cpu_seconds()
    result: dict[str, Any] = {
        "part": part_file.stem,
        **asdict(training),
        "steps": part.steps_of(training.condition),
        "design": digest,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fill = _places(root, part, training)
    config = None if training.arm == START else _config_of(part, training, run_dir, fill)
    try:
        checkpoint = Path(fill["start"]) if config is None else _train(part, config)
        result |= _outcome(part, training, run_dir, fill, checkpoint)
    except Diverged as error:
        log.info(f"{run_dir}: {error}")
        result["failed"] = str(error)
    result |= {"cpu_seconds": _cpu_seconds() - before, "commit": commit(), "versions": versions()}
    write_atomically(path, json.dumps(result) + "\n")
    for folder in BULKY:
        shutil.rmtree(run_dir / folder, ignore_errors=True)
    free_device_memory()


def design(part: Part, training: Training) -> str:
    """A digest of all that a part states of one run: world, start, settings, problems."""
    condition = part.conditions[training.condition]
    world_and_start = condition.model_dump(include={"world", "start"})
    training_settings = [] if training.arm == START else [part.command, part.config, *settings_of(part, training)]
    settings = [*training_settings, part.eval_config, *_judged(part, "test")]
    return hashlib.sha256(json.dumps([world_and_start, settings]).encode()).hexdigest()[:12]


def _config_of(part: Part, training: Training, run_dir: Path, fill: Mapping[str, str]) -> schema.RunConfig:
    settings = [*_filled(settings_of(part, training), fill), f"run_dir={run_dir}"]
    return load_config(VERBS[part.command].config, config_path(part.config), settings)


def _train(part: Part, config: schema.RunConfig) -> Path:
    model = config.run_dir / "model"
    if not model.exists():
        _run(VERBS[part.command].train, config)
    return model


def settings_of(part: Part, training: Training) -> list[str]:
    """Overrides of one run, with placeholders: the part's, the condition's, the arm's, its own."""
    verb, steps = VERBS[part.command], part.steps_of(training.condition)
    return [
        *part.overrides,
        *part.conditions[training.condition].overrides,
        *part.arms[training.arm].overrides,
        f"seed={training.seed}",
        f"{verb.steps}={steps}",
        f"{verb.rate}={training.rate}",
        *_validation(part, training, steps),
    ]


def _filled(settings: Sequence[str], fill: Mapping[str, str]) -> list[str]:
    return [Template(text).substitute(fill) for text in settings]


def _validation(part: Part, training: Training, steps: int) -> tuple[str, ...]:
    """Validation at the end of a swept run; on the way, for a curve, in one that counts."""
    every = steps if training.swept else part.curve_every
    if part.command == "selfplay":  # it evaluates after every iteration
        return _judged(part, "validation")
    if not every:
        return ("evaluation={}",)
    return f"evaluation.every={every}", *_judged(part, "validation")


def _outcome(
    part: Part, training: Training, run_dir: Path, fill: Mapping[str, str], checkpoint: Path
) -> dict[str, Any]:
    rows = read_rows(run_dir / METRICS) if training.arm != START else []
    validation = {
        name: [(r["step"], r[f"accuracy_{name}"]) for r in rows if f"accuracy_{name}" in r] for name in part.sets
    }
    result: dict[str, Any] = {"validation": validation}
    if rows:
        result["logged"] = {key: mean(row[key] for row in rows if key in row) for key in part.logged if key in rows[-1]}
        result["step_cpu_seconds"] = _step_seconds(rows, part)
    if part.command == "selfplay" and rows:
        result["logged"] |= bank_facts(run_dir / "bank")
    if training.swept:
        return result
    settings = [f"checkpoint={checkpoint}", *_judged(part, "test")]
    tested = run_dir / "test"
    _call(evaluate, schema.EvalConfig, part.eval_config, _filled(settings, fill), tested)
    result["correct"] = _correct(tested / "samples.jsonl")
    shutil.rmtree(tested)
    return result


def _judged(part: Part, split: str) -> tuple[str, ...]:
    """Overrides: the problems of a split, and how they are answered."""
    sets = {
        name: {"path": getattr(one, split), "layout": one.layout, "limit": one.limit} for name, one in part.sets.items()
    }
    temperature = () if part.temperature is None else (f"evaluation.sampling.temperature={part.temperature}",)
    return f"evaluation.sets={json.dumps(sets)}", *temperature


def _correct(samples: Path) -> dict[str, str]:
    """Measure -> whether each answer is right, in the order of the problems (see `results.pack`)."""
    right: dict[str, list[bool]] = {}
    for row in read_rows(samples):
        right.setdefault(row["set"], []).append(row["verdict"] == "correct")
    return {name: pack(answers) for name, answers in right.items()}


def _step_seconds(rows: Sequence[dict], part: Part) -> float:
    """Mean CPU seconds of a step that does not evaluate (nan where all do)."""
    seconds = [
        r["cpu_seconds"] for r in rows if "cpu_seconds" in r and not any(f"accuracy_{m}" in r for m in part.sets)
    ]
    return sum(seconds) / len(seconds) if seconds else math.nan


def _places(root: Path, part: Part, training: Training) -> dict[str, str]:
    """The values of a part's placeholders for one run."""
    condition = part.conditions[training.condition]
    if condition.world is None:
        return {"start": condition.start} if isinstance(condition.start, str) else {}
    world = world_paths(root, condition.world)
    names = ("teacher", "base", "train", "solver", "vision_teacher", "pictures")
    fill = {name: str(getattr(world, name)) for name in names} | {"configs": str(CONFIGS)}
    fill |= {
        f"{split}_{form}": str(getattr(world, form)(split)) for split in ("val", "test") for form in ("text", "image")
    }
    if isinstance(condition.start, Start):
        fill["start"] = str(start_path(root, condition.world, condition.start, training.seed))
    elif condition.start is not None:
        fill["start"] = condition.start
    return fill


def _call(
    verb: Callable[..., None], config: type[schema.RunConfig], name: str, settings: Sequence[str], run_dir: Path
) -> None:
    _run(verb, load_config(config, config_path(name), [*settings, f"run_dir={run_dir}"]))


def _run(verb: Callable[..., None], config: schema.RunConfig) -> None:
    """A stage in this process, resumed where an earlier one was interrupted."""
    verb(config, **({} if verb is evaluate else {"resume": (config.run_dir / "config.yaml").exists()}))
    free_device_memory()


def config_path(name: str) -> Path:
    """A config of the miniature by its name, or any other by its path."""
    return CONFIGS / name if (CONFIGS / name).exists() else Path(name)


def _shared(root: Path, world: WorldKeys) -> Path:
    return root / "science" / "starts" / world_root(root, world).name


def _cpu_seconds() -> float:
    """Of this process and of its ended children (graders)."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
