"""Hugging Face checkpoint directories: which file holds a tensor, and writing a trained copy of one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
# Text tensors as transformers spelled them over the years, on disk and in `state_dict()`.
TEXT_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head)|model\.)")
# Weights are rewritten or would be stale copies; everything else in the source belongs to the checkpoint.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX)


def tensor_files(checkpoint_dir: Path) -> dict[str, str]:
    """{tensor name: file name} of a checkpoint directory, sharded or not. Raises ValueError when a file is absent."""
    index = checkpoint_dir / INDEX
    if index.is_file():
        files = dict(json.loads(index.read_text())["weight_map"])
        absent = sorted({file for file in files.values() if not (checkpoint_dir / file).is_file()})
        if absent:
            raise ValueError(f"{checkpoint_dir / absent[0]}, named by the index, is missing: download it again")
        return files
    single = checkpoint_dir / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{checkpoint_dir} has no model.safetensors (nor an index): give a safetensors checkpoint")
    with safe_open(single, framework="pt", device="cpu") as handle:
        return dict.fromkeys(handle.keys(), single.name)


def short_name(name: str) -> str:
    """`layers.0.…`, `norm.weight`, `embed_tokens.weight`, `lm_head.weight`, or `visual.…`, whatever the spelling."""
    return TEXT_PREFIX.sub("", name)


def export_checkpoint(
    source_dir: str | Path,
    target_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    amend: Callable[[Path], None] | None = None,
) -> Path:
    """Write `source_dir` with some of its tensors replaced: what `from_pretrained` loads at once.

    Files, shards, tensor names and dtypes are those of the source; config, tokenizer, processor and chat template are
    copied, and so are tensors not in `tensors` (the vision tower). `amend` may edit the directory before it appears.
    The directory is written aside and renamed when complete. The new tensors are held in CPU memory meanwhile.
    Raises ValueError when the target holds something, or when a tensor is unknown to the source or has another shape.
    """
    source, target = Path(source_dir), Path(target_dir)
    _refuse_occupied(target)
    files = tensor_files(source)
    replaced = _by_source_name(tensors, files, source)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _copy_other_files(source, aside)
        for file in sorted(set(files.values())):
            _write_shard(source / file, aside / file, replaced)
        if amend is not None:
            amend(aside)
        _sync_directory(aside)
        if target.is_dir():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _refuse_occupied(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target} is not empty: export to a new directory")


def _by_source_name(tensors: Iterable[tuple[str, Tensor]], files: dict[str, str], source: Path) -> dict[str, Tensor]:
    spelling = {short_name(name): name for name in files}
    replaced = {}
    for name, tensor in tensors:
        key = spelling.get(short_name(name))
        if key is not None:
            replaced[key] = tensor.detach().cpu()
        elif short_name(name) != "lm_head.weight":  # a tied head is not stored
            raise ValueError(f"{source} has no tensor {name}: export to a copy of the checkpoint that was trained")
    return replaced


def _copy_other_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name == INDEX or (path.is_file() and not path.name.endswith(NOT_COPIED)):
            shutil.copyfile(path, target / path.name)


def _write_shard(source: Path, target: Path, replaced: dict[str, Tensor]) -> None:
    tensors = {}
    with safe_open(source, framework="pt", device="cpu") as handle:
        for name in handle.keys():  # noqa: SIM118 - not a dict
            original = handle.get_tensor(name)
            new = replaced.get(name, original)
            if new.shape != original.shape:
                raise ValueError(f"{source}: tensor {name} is {tuple(original.shape)}, the new one {tuple(new.shape)}")
            tensors[name] = new.to(original.dtype).contiguous()
        save_file(tensors, target, metadata={"format": "pt", **(handle.metadata() or {})})


def _sync_directory(directory: Path) -> None:
    """Flush every file and the directory itself, so that the rename cannot survive a crash that its content did not."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
