"""Reads YAML files and overrides into one frozen config; a mistake is one line that names the field, the value and the
fix."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vold.config.schema import RlConfig, SftConfig, Strict
from vold.io import one_line_errors
from vold.untrusted import parse_yaml, read_yaml

ConfigT = TypeVar("ConfigT", bound=Strict)

RENAMED_KEYS = {
    "objective.clip_low": "objective.clip_eps_low",
    "objective.clip_high": "objective.clip_eps_high",
    "visual_reliance_every": "image_sensitivity_every",
}
"""Old -> new dotted key, wherever its path ends so (challenger.objective.clip_low too)."""
RENAMED_VALUES = {
    "objective.divergence": {"full": "reverse_kl", "forward": "forward_kl"},
}
"""Dotted key -> {old value: new value}."""

HABITS = {
    "epochs": "a run has steps: rows * epochs / rows of a step",
    "num_train_epochs": "a run has steps: rows * epochs / rows of a step",
    "total_epochs": "a run has steps: rows * epochs / rows of a step",
    "max_steps": "it is steps",
    "learning_rate": "it is optimizer.lr",
    "warmup_ratio": "it is optimizer.warmup_steps, a number of steps",
    "lr_scheduler_type": "it is optimizer.schedule",
    "max_grad_norm": "it is optimizer.clip_grad",
    "gradient_checkpointing": "it is parallel.recompute=selective or full",
    "activation_checkpointing": "it is parallel.recompute=selective or full",
    "gradient_accumulation_steps": "it follows from microbatch_tokens and the rows of a step",
    "per_device_train_batch_size": "a step has batch_size (sft) or prompts_per_step (rl) over all ranks",
    "train_batch_size": "a step has batch_size (sft) or prompts_per_step (rl) over all ranks",
    "num_generations": "it is rollout.responses_per_prompt",
    "max_completion_length": "it is rollout.max_new_tokens",
    "max_response_length": "it is rollout.max_new_tokens",
    "max_prompt_length": "it is prompt.max_tokens",
    "max_length": "it is max_tokens (sft) or rollout.max_new_tokens (rl)",
    "kl_coef": "it is objective.beta",
    "beta": "it is objective.beta",
    "epsilon": "it is objective.clip_eps_low and objective.clip_eps_high",
    "loss_type": "it is objective.preset",
    "algorithm": "it is objective.preset",
    "output_dir": "it is run_dir",
    "model": "it is student",
    "model_name_or_path": "it is student",
    "teacher_model_name_or_path": "it is teacher",
    "dataset": "it is data.path with data.layout",
    "dataset_name": "it is data.path with data.layout",
    "system_prompt": "it is prompt.system",
    "save_steps": "it is save_every",
    "eval_steps": "it is evaluation.every",
    "save_total_limit": "it is keep_checkpoints",
    "logging_steps": "every step is logged",
    "report_to": "it is loggers=[wandb]",
    "resume_from_checkpoint": "it is the option --resume",
    "bf16": "it is dtype=bfloat16",
    "torch_dtype": "it is dtype",
    "use_vllm": "it is rollout.engine=vllm",
    "vllm_mode": "it is rollout.vllm.urls: empty inside the process, else engines of vold serve",
    "reward_funcs": "it is reward, see docs/config.md",
    "deepspeed": "models are divided by parallel.tp, pp and distributed_optimizer",
    "fsdp": "models are divided by parallel.tp, pp and distributed_optimizer",
    "ulysses_sequence_parallel_size": "it is parallel.cp",
    "sequence_parallel_size": "it is parallel.cp: ranks that share the tokens",
    "context_parallel_size": "it is parallel.cp",
    "tensor_model_parallel_size": "it is parallel.tp",
    "pipeline_model_parallel_size": "it is parallel.pp",
    "sequence_parallel": "it is parallel.sp",
    "lora": "it is adapter={rank: 16, alpha: 32}",
    "lora_rank": "it is adapter={rank: 16, alpha: 32}",
    "lora_r": "it is adapter.rank",
    "lora_alpha": "it is adapter.alpha",
    "lora_target_modules": "it is adapter.targets: qkv, proj, fc1, fc2",
    "dora": "vLLM serves no DoRA, nor is it trained here; it is adapter={rank: 16, alpha: 32}",
    "use_dora": "vLLM serves no DoRA, nor is it trained here; it is adapter={rank: 16, alpha: 32}",
    "use_rslora": "it is adapter.rslora",
    "lora_dropout": "it is adapter.dropout",
    "load_in_8bit": "it is adapter.base_bits=8",
    "load_in_4bit": "it is adapter.base_bits=4",
    "quant_bits": "it is adapter.base_bits",
    "peft": "it is adapter={rank: 16, alpha: 32}",
    "use_peft": "it is adapter={rank: 16, alpha: 32}",
    "freeze_vision_tower": "it is frozen unless train names it: train=[language_model, visual]",
    "freeze_vit": "it is frozen unless train names it: train=[language_model, visual]",
    "freeze_aligner": "it is frozen unless train names it: train=[language_model, visual.merger]",
    "freeze_llm": "it is train=[visual], or what else is trained",
    "freeze_parameters": "it is train: what is trained",
    "trainable_parameters": "it is train: [patterns]",
    "vit_lr": "it is optimizer.lr_groups={visual: 2.0e-6}",
    "aligner_lr": "it is optimizer.lr_groups={visual.merger: 2.0e-6}",
}
"""Keys of other trainers (TRL, verl, ms-swift, axolotl) -> what is here in their place."""

REDACTED = "[redacted]"
_SECRET_KEY = re.compile(r"(?:^|_)(?:token|secret|password|passwd|credentials?|(?:api|access|private)_?key)$", re.I)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:gh[pousr]|github_pat)_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}|xox[a-z]-[\w-]{10,}"
    r"|eyJ[\w-]+\.[\w-]+\.[\w-]+)"
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.I)


@one_line_errors()
def load_config(schema: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply the overrides in order, validate: `a.b=value` (values are YAML), or the path of a YAML file
    whose keys are laid over what is there, section by section. Raises ValueError with one line."""
    return _validate(schema, _read_tree(path, overrides), path)


@one_line_errors()
def load_training_config(path: Path, overrides: Sequence[str] = ()) -> RlConfig | SftConfig:
    """`load_config` for either training stage; the schema is chosen by `rollout`, which only RlConfig has."""
    tree = _read_tree(path, overrides)
    return _validate(RlConfig if "rollout" in tree else SftConfig, tree, path)


def _read_tree(path: Path, overrides: Sequence[str]) -> dict:
    tree = _read_yaml(path)
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            _lay_over(tree, _read_yaml(Path(override)))
        else:
            _apply(tree, override)
    return tree


def _lay_over(tree: dict, over: dict) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _lay_over(tree[key], value)
        else:
            tree[key] = value


def _validate(schema: type[ConfigT], tree: dict, path: Path) -> ConfigT:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path}: {_one_line(error, schema)}") from None


def dump_config(config: Strict, verb: str) -> str:
    """The resolved config as YAML, with the verb that used it; values that look like secrets are redacted."""
    return yaml.safe_dump({"verb": verb, **_redacted(config.model_dump(mode="json"))}, sort_keys=False)


def in_present_terms(tree: dict, schema: type[BaseModel]) -> dict:
    """A run's config as this version would write it: renamed keys and values have their new names, and keys that the
    version before did not have their defaults. Keys that are no longer known stay as they are, and so does a config
    that is not valid today."""
    try:
        return _in_present_terms(_renamed(tree), schema)
    except (LookupError, TypeError, AttributeError, RecursionError):  # a damaged file
        return tree


def _in_present_terms(renamed: dict, schema: type[BaseModel]) -> dict:
    known = copy.deepcopy({name: value for name, value in renamed.items() if name != "verb"})
    unknown: list[tuple[tuple, object]] = []
    while True:
        try:
            present = {"verb": renamed.get("verb"), **_redacted(schema.model_validate(known).model_dump(mode="json"))}
            break
        except ValidationError as error:
            extra_keys = [tuple(item["loc"]) for item in error.errors() if item["type"] == "extra_forbidden"]
            if not extra_keys:
                return renamed
            unknown += [(key_path, _section(known, key_path).pop(key_path[-1])) for key_path in extra_keys]
    for key_path, value in unknown:
        _section(present, key_path)[key_path[-1]] = value
    return present


def _section(tree: dict, key_path: tuple) -> dict:
    for name in key_path[:-1]:
        tree = tree[name]
    return tree


def _renamed(tree: dict, section: str = "") -> dict:
    """The tree with the present names of its keys and values, wherever they are."""
    renamed = {}
    for name, value in tree.items():
        path = f"{section}.{name}"
        for old, new in RENAMED_KEYS.items():
            if path.endswith(f".{old}"):
                path = path.removesuffix(old) + new
                name = new.rpartition(".")[2]  # other names may hold dots of their own: a file, a data set
        if isinstance(value, dict):
            value = _renamed(value, path)
        renamed[name] = _renamed_value(path, value) or value
    return renamed


def _redacted(value, key: str = ""):
    """The value without secrets, as run directories are shared: values of keys like `api_key`, known kinds of tokens,
    and passwords in URLs."""
    if isinstance(value, dict):
        return {name: _redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_KEY.search(key):
        return REDACTED
    return _SECRET_VALUE.sub(REDACTED, _USERINFO.sub(rf"\1{REDACTED}@", value))


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"config {path} {reason}; configs/ holds examples")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, found {type(tree).__name__}")
    if tree.pop("verb", None) and path.name == "config.yaml" and (path.parent / "metrics.jsonl").is_file():
        tree["run_dir"] = str(path.parent)  # a run's own config, used again: the run is here, wherever it began
    return tree


def _apply(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(
            f"override {override!r} is not of the form key=value, e.g. optimizer.lr=1e-5, nor a .yaml file"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    try:
        tree[leaf] = _number(parse_yaml(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value") from None


def _number(value):
    """The number that a string spells: YAML 1.1 reads 1e-5 as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    first, *others = error.errors()
    # the loc of a union's member ends in pydantic's name for it: step.constrained-int
    field = ".".join(str(part) for part in first["loc"] if part != "constrained-int") or "config"
    if first["type"] == "extra_forbidden":
        line = f"unknown key {field}; {_fix_of_unknown_key(field, schema)}"
    elif first["type"] == "missing":
        line = f"{field} is missing; add it or give {field}=VALUE on the command line"
    elif first["type"] == "value_error":  # a validator of ours: it names field, value and fix itself
        line = first["msg"].removeprefix("Value error, ")
    elif new_value := _renamed_value(field, first["input"]):
        line = f"{field} = {first['input']!r}: {first['input']!r} is now {new_value!r}"
    else:
        message = first["msg"]
        line = f"{field} = {first['input']!r}: {message[0].lower()}{message[1:]}"
    return line + (f" (and {len(others)} more)" if others else "")


def _fix_of_unknown_key(field: str, schema: type[BaseModel]) -> str:
    for old, new in RENAMED_KEYS.items():
        if f".{field}".endswith(f".{old}"):
            return f"it is now {field.removesuffix(old)}{new}"
    keys = _dotted_keys(schema)
    section, _, name = field.rpartition(".")
    for part in field.split("."):
        if part in HABITS and f"{section}.{part}".lstrip(".") not in keys:
            return HABITS[part]
    close = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], n=1)
    if not close:
        return "remove it"
    if f"{section}.{close[0]}".lstrip(".") in keys:
        return f"did you mean {close[0]}?"
    return f"did you mean {next(key for key in keys if f'.{key}'.endswith(f'.{close[0]}'))}?"


def _renamed_value(field: str, value: object) -> str | None:
    for key, new_values in RENAMED_VALUES.items():
        if f".{field}".endswith(f".{key}") and isinstance(value, str):
            return new_values.get(value)
    return None


def _dotted_keys(schema: type[BaseModel], section: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in schema.model_fields.items():
        keys.append(section + name)
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _dotted_keys(kind, f"{section}{name}.")
    return keys
