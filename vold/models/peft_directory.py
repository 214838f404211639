"""An adapter's directory as peft writes it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vold.config.schema import AdapterConfig
from vold.io import to_json
from vold.models.adapters import PROJECTIONS, visual_target
from vold.models.checkpoint_dir import new_checkpoint
from vold.untrusted import check_tensor_header, read_json

MODULE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_[AB]\.weight")
UNREAD = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication")
"""What an adapter of peft may have and this one has not."""


def write_adapter(out: Path, base: Path, config: AdapterConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a directory as peft does. base: the checkpoint that the adapter belongs to. tensors: by peft's names."""
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        **_target_modules(config, named),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if config.alpha.is_integer():
        settings["lora_alpha"] = int(config.alpha)  # as peft writes it; vLLM's key is an integer
    with new_checkpoint(out) as partial:
        save_file(named, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text(to_json(settings, indent=2))


def _target_modules(config: AdapterConfig, names: Iterable[str]) -> dict[str, list[str] | str]:
    """Names of projections, of which a vision tower's, which has the same, is left out; one expression where modules of
    the tower are among the targets."""
    projections = [name for target in config.targets for name in PROJECTIONS.get(target, ())]
    modules = {module for name in names if ".visual." in (module := _module(name))}
    if not modules:
        return {"target_modules": projections, "exclude_modules": r"(.*\.)?visual\..*"}
    visual = {re.sub(r"\b(blocks|deepstack_merger_list)\\\.\d+", r"\1\.\\d+", re.escape(module)) for module in modules}
    text = [rf"(.*\.)?layers\.\d+\.\w+\.({'|'.join(projections)})"] if projections else []
    return {"target_modules": "|".join([*text, *sorted(visual)])}


def _module(name: str) -> str:
    """The module of a tensor, without peft's prefix."""
    match = MODULE.fullmatch(name)
    return match[1] if match else name


def _targets(names: Iterable[str]) -> set[str]:
    """The targets of a file with these tensors; a name of its own where none of ours has such a module."""
    of_module = {name: target for target, names in PROJECTIONS.items() for name in names}
    found = set()
    for module in map(_module, names):
        _, is_visual, rest = module.partition("visual.")
        short = module.rpartition(".")[2]
        found.add(visual_target(rest) if is_visual else of_module.get(short, short))
    return found


@contextmanager
def adapter_tensors(config: AdapterConfig) -> Iterator[safe_open]:
    """The opened tensors of config.path. Raises ValueError where its adapter is not the one that `config` describes."""
    assert config.path is not None
    settings = read_json(config.path / "adapter_config.json")
    if unknown := [key for key in UNREAD if settings.get(key)]:
        raise ValueError(f"adapter.path = {config.path} has {unknown[0]}, which is not supported; merge it with peft")
    file = config.path / "adapter_model.safetensors"
    check_tensor_header(file)
    with safe_open(file, framework="pt", device="cpu") as tensors:
        stored = {
            "rank": settings.get("r"),
            "alpha": settings.get("lora_alpha"),
            "rslora": bool(settings.get("use_rslora")),
            "targets": sorted(_targets(tensors.keys())),
        }
        described = config.model_dump(include={"rank", "alpha", "rslora"})
        for key, value in {**described, "targets": sorted(config.targets)}.items():
            if stored[key] != value:
                raise ValueError(f"adapter.{key} is {value}, but {config.path} has {stored[key]}; make them equal")
        yield tensors


def check_matrix(stored: safe_open, name: str, shape: tuple[int, ...], config: AdapterConfig) -> Tensor:
    """A tensor of an adapter's file. Raises ValueError where it is missing or has another shape."""
    if name not in stored.keys():  # noqa: SIM118 - not a dict
        raise ValueError(f"adapter.path = {config.path} has no {name}: it is of another model")
    if tuple(stored.get_slice(name).get_shape()) != shape:
        found = tuple(stored.get_slice(name).get_shape())
        raise ValueError(f"adapter.path = {config.path}: {name} has shape {found}, the model's is {shape}")
    return stored.get_tensor(name)
