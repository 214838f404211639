"""`vold init`: a commented config to start from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import yaml
from pydantic import BaseModel

from vold.config import schema
from vold.config.reference import description, section_of
from vold.config.schema import DataConfig, Strict
from vold.data.cells import Cells
from vold.data.rows import read_rows
from vold.io import log, write_atomically

COLUMNS = 120
SCHEMAS: dict[str, type[Strict]] = {
    "traces": schema.TracesConfig,
    "sft": schema.SftConfig,
    "rl": schema.RlConfig,
    "eval": schema.EvalConfig,
}
RUN = {"run_dir": "runs/mine/{stage}", "loggers": None, "prompt.max_tokens": None, "prompt.chat_template": None}
DATA = {"data.path": "data/mine.jsonl", "data.layout": "vqa", "data.columns": None, "data.on_error": None}
OPTIMIZER = {"optimizer.warmup_steps": 5, "optimizer.schedule": "cosine", "optimizer.weight_decay": 0.01}
TRAIN = {"microbatch_tokens": 16384, "save_every": 10, "keep_checkpoints": None}
LAYOUT = {"parallel.tp": None, "parallel.pp": None, "parallel.recompute": "selective"}
KEYS: dict[str, dict[str, object]] = {
    "traces": {"teacher": "checkpoints/teacher"}
    | DATA
    | RUN
    | {"engine": "vllm", "sampling.max_new_tokens": 7168, "sampling.temperature": 0.6, "max_tokens": None},
    "sft": {"student": "checkpoints/student", "pair_with": None}
    | (DATA | {"data.path": "runs/mine/traces/traces", "data.layout": "traces"})
    | RUN
    | {"steps": 4000, "batch_size": 256, "max_tokens": 8192, "optimizer.lr": 5e-5}
    | (OPTIMIZER | {"optimizer.warmup_steps": 150})
    | (TRAIN | {"save_every": 500})
    | LAYOUT,
    "rl": {"student": "runs/mine/sft/model", "teacher": "checkpoints/teacher", "teacher_offload": True}
    | DATA
    | RUN
    | {"steps": 60, "prompts_per_step": 256, "rollout.engine": "vllm", "rollout.max_new_tokens": 7168}
    | {"rollout.responses_per_prompt": 5, "rollout.temperature": None, "rollout.vllm.sleep": True}
    | {"objective.preset": "vold", "objective.beta": None, "reward.function": None, "optimizer.lr": 6e-6}
    | OPTIMIZER
    | TRAIN
    | LAYOUT,
    "eval": {"checkpoint": "runs/mine/rl/model"}
    | RUN
    | {"engine": "vllm", "evaluation.sampling.max_new_tokens": 7168, "evaluation.sampling.temperature": 0.0},
}
"""Stage -> dotted key -> the value that is written; None: written as a comment, with its default."""


def write_config(stage: str, out: Path, paths: Mapping[str, Path | None]) -> None:
    """Write a config of `stage` with the paths that are given (student, teacher, data) in their places.

    Raises ValueError where `out` exists, or where the stage has no such path.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another file")
    values = KEYS[stage] | {"run_dir": f"runs/mine/{stage}"}
    for option, path in paths.items():
        if path is not None:
            values |= _with_path(stage, option, path)
    run, check = f"vold {stage} {out}", f"vold check {stage} {out}"
    usage = [f"# {run}", f"# on 8 GPUs: torchrun --nproc-per-node 8 -m {run}"]
    usage = [f"# {check}", *usage] if stage in ("sft", "rl") else usage
    header = [*usage, "# All keys: vold keys. Those behind a # have the default that they show."]
    write_atomically(out, "\n".join([*header, *_lines(SCHEMAS[stage], _tree(values), "")]) + "\n")
    log.info(f"wrote {out}; read it through, then: {header[0].removeprefix('# ')}")


def _with_path(stage: str, option: str, path: Path) -> dict[str, object]:
    """The keys that an option sets."""
    key = {"data": "data.path"}.get(option, option)
    if stage == "eval":
        key = {"student": "checkpoint", "data": "evaluation.sets.mine.path"}.get(option, key)
    if key not in KEYS[stage] and option != "data":
        raise ValueError(f"--{option}: vold {stage} has no {option}; leave it out")
    return {key: str(path)} | (_layout(path, key.removesuffix("path")) if option == "data" else {})


def _layout(path: Path, prefix: str) -> dict[str, object]:
    """Layout and columns that the first row fits."""
    (row,) = islice(read_rows(DataConfig(path=path, layout="vqa")), 1)
    cells = Cells(row.cells, {})
    if not (settings := cells.fitting()):
        log.warning(f"{path}: no known layout fits, {cells.columns()}; write data.columns, see docs/your-own-data.md")
        return {f"{prefix}layout": "vqa"}
    pairs = (setting.removeprefix("data.").split("=", 1) for setting in settings.split(" data."))
    return {f"{prefix}{name}": yaml.safe_load(value) for name, value in pairs}


def _tree(values: Mapping[str, object]) -> dict:
    tree: dict = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    return tree


def _lines(section: type[BaseModel], tree: Mapping[str, object], indent: str) -> Iterator[str]:
    for name, value in tree.items():
        info = section.model_fields[name]
        inner = section_of(info)
        if isinstance(value, dict) and inner:
            is_commented = not any(True for _ in _set_values(value))
            yield f"{indent}{'# ' if is_commented else ''}{name}:"
            yield from _lines(inner, value, indent + "  ")
        elif value is None:
            default = info.get_default()
            default = list(default) if isinstance(default, tuple) else default
            yield from _commented(f"{indent}# {name}: {_scalar(default)}", description(info))
        else:
            yield from _commented(f"{indent}{name}: {_scalar(value)}", description(info))


def _commented(line: str, meaning: str) -> Iterator[str]:
    """A line with its meaning behind it, or before it where the two are too long."""
    if len(line) + len(meaning) + 4 <= COLUMNS:
        yield f"{line}  # {meaning}"
    else:
        indent = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(meaning, COLUMNS, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield line


def _set_values(tree: Mapping[str, object]) -> Iterator[object]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _set_values(value)
        elif value is not None:
            yield value


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
