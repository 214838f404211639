"""Hugging Face checkpoint directories: which file holds a tensor, and writing a trained copy of one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vold.io import flush_to_disk, log, visible
from vold.untrusted import check_size, check_tensor_header, is_plain_name, read_json

INDEX = "model.safetensors.index.json"
# Text tensors as transformers spelled them over the years, on disk and in `state_dict()`.
TEXT_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head)|model\.)")
# Files that libraries read whole, and the most bytes they may have.
MOST_LAYERS, MOST_SIZE, MOST = 10_000, 2**24, 2**40  # in config.json: layers, widths and rows, anything
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TEXT_SUFFIXES, TEXT_BYTES = (".json", ".jinja", ".txt", ".model"), 8 * 2**20
LARGE_TEXTS, LARGE_TEXT_BYTES = ("tokenizer.", "vocab.", "merges.", INDEX), 128 * 2**20
USUAL_FILES = re.compile(
    r"(config|generation_config|tokenizer.*|vocab|merges|special_tokens_map|added_tokens|.*processor_config|chat_template)"
    r"\.(json|txt|jinja|model)"
)
# Weights in other formats would be stale copies; everything else in the source belongs to the checkpoint.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX)


def lacks(path: Path, file: str) -> ValueError:
    """The error for a directory that is no checkpoint; a name on the Hugging Face hub is taken for one."""
    advice = "give the directory of a Hugging Face checkpoint"
    if not path.parent.exists() and HUB_NAME.fullmatch(str(path)):
        advice = f"download it first, `hf download {path} --local-dir DIR`, and give that directory"
    return ValueError(f"{path} has no {file}: {advice}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any exception of a library that reads `path` into a ValueError of one line that names it. Our own pass."""
    try:
        _check_sizes(path)
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}; copy it from the original again") from None


def _check_sizes(path: Path) -> None:
    """Of the files beside the weights, which libraries read whole."""
    for file in path.iterdir() if path.is_dir() else ():
        if file.suffix in TEXT_SUFFIXES and file.is_file():
            check_size(file, LARGE_TEXT_BYTES if file.name.startswith(LARGE_TEXTS) else TEXT_BYTES)
    config = path / "config.json"
    if path.is_dir() and config.is_file():
        try:
            value = read_json(config)
        except ValueError:  # the library says what is wrong with it
            return
        check_numbers(config, value)


def check_numbers(file: Path, value: object, key: str = "") -> None:
    """Refuse a config.json that would make a list of its layers, or a table of its positions, of any length."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_numbers(file, item, str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        is_size = key.endswith(("_size", "_dim", "heads"))
        most = MOST_LAYERS if "layer" in key or key == "depth" else MOST_SIZE if is_size else MOST
        if not -MOST <= value <= most:
            name = visible(key[:100])
            raise ValueError(f"{file}: {name} = {str(value)[:40]} is no model's: copy it from the original again")


def tensor_files(checkpoint_dir: Path) -> dict[str, str]:
    """The tensors of a checkpoint directory, sharded or not: {tensor name: file name}. Raises ValueError when a file is
    missing or damaged."""
    index = checkpoint_dir / INDEX
    if index.is_file():
        with reading(index):
            files = dict(read_json(index)["weight_map"])
        if bad := [file for file in files.values() if not is_plain_name(file)]:
            raise ValueError(
                f"{index} names {bad[0]!r}, which is no file beside it: copy the index from the original again"
            )
        missing = sorted({file for file in files.values() if not (checkpoint_dir / file).is_file()})
        if missing:
            raise ValueError(f"{checkpoint_dir / missing[0]}, named by the index, is missing: download it again")
        return files
    single = checkpoint_dir / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{checkpoint_dir} has no model.safetensors (nor an index): give a safetensors checkpoint")
    with open_tensors(single) as handle:
        return dict.fromkeys(handle.keys(), single.name)


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, opened on the CPU; a context manager, too. Raises ValueError for a damaged file."""
    with reading(path):
        check_tensor_header(path)
        return safe_open(path, framework="pt", device="cpu")


def short_name(name: str) -> str:
    """A tensor's name without prefixes: `layers.0.…`, `norm.weight`, `embed_tokens.weight`, `lm_head.weight`,
    `visual.…`."""
    return TEXT_PREFIX.sub("", name)


def export_checkpoint(
    source_dir: str | Path,
    target_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    amend: Callable[[Path], None] | None = None,
) -> Path:
    """Write a copy of `source_dir`, with some of its tensors replaced, that `from_pretrained` loads.

    The source is copied: shards, tensor names and dtypes, config, tokenizer, processor, chat template. Each of
    `tensors` then overwrites its bytes in the copy, so that one at a time is in memory; the others (the vision tower)
    stay. `amend` may edit the directory before it appears: it has a temporary name until it is complete and on disk.
    Raises ValueError when the target is not empty, or when a tensor is unknown to the source or has another shape.
    """
    source, target = Path(source_dir), Path(target_dir)
    with new_checkpoint(target) as partial:
        files = tensor_files(source)
        _copy_files(source, partial, set(files.values()))
        _overwrite(partial, files, tensors, source)
        if amend is not None:
            amend(partial)
    return target


@contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when the block ends without an error and its files are on disk.

    Raises ValueError when the target is not empty.
    """
    _check_empty(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):  # or the rename could survive a crash that the content did not
            flush_to_disk(path)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_empty(target: Path) -> None:
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        reason = "is a link" if target.is_symlink() else "is not empty"
        raise ValueError(f"{target} {reason}: export to a new directory")


def _copy_files(source: Path, target: Path, shards: set[str]) -> None:
    for path in sorted(source.iterdir()):
        if path.name in (INDEX, *shards):
            shutil.copyfile(path, target / path.name)
        elif path.is_file() and not path.name.endswith(NOT_COPIED):
            if _belongs(path):
                shutil.copyfile(path, target / path.name)
            else:
                log.warning(f"{path} is not copied: it is a link to {path.resolve()}, out of the checkpoint")


def _belongs(path: Path) -> bool:
    """Whether a file is the checkpoint's own: no link that leads elsewhere, by which a copy would publish any file of
    this machine. Links into the blobs of a Hugging Face cache, and of a checkpoint's usual files to ones of the same
    name, are its own."""
    real, directory = path.resolve(), path.parent.resolve()
    blobs = directory.parent.parent / "blobs"
    same_name = real.name == path.name and USUAL_FILES.fullmatch(path.name) is not None
    return same_name or real.is_relative_to(directory) or real.parent == blobs


def _overwrite(target: Path, files: dict[str, str], tensors: Iterable[tuple[str, Tensor]], source: Path) -> None:
    spelling = {short_name(name): name for name in files}
    for name, tensor in tensors:
        key = spelling.get(short_name(name))
        if key is not None:
            _overwrite_tensor(target / files[key], key, tensor.detach(), source / files[key])
        elif matrices := expert_matrices(name, tensor):  # a file with a tensor for each expert
            _overwrite(target, files, matrices.items(), source)
        elif short_name(name) != "lm_head.weight":  # a tied head is not stored
            raise ValueError(f"{source} has no tensor {name}: export to a copy of the checkpoint that was trained")


def expert_matrices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The matrices of each expert, by the names that most files have, of a tensor of them all (see joined.py); {} for
    another tensor."""
    prefix, _, projection = name.partition(".experts.")
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(projection, ())
    return {
        f"{prefix}.experts.{number}.{part}_proj.weight": rows
        for number, matrix in enumerate(tensor if parts else ())
        for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True)
    }


def _overwrite_tensor(path: Path, name: str, new: Tensor, origin: Path) -> None:
    with open_tensors(path) as handle:
        stored = handle.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored[:0].dtype
    if name.partition(".experts.")[2] in ("gate_up_proj", "down_proj") and new.shape != shape:
        new = new.transpose(1, 2)  # as the published Qwen3-VL-MoE has them
    if new.shape != shape:
        raise ValueError(f"{origin}: tensor {name} is {shape}, the new one {tuple(new.shape)}")
    content = new.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
    with path.open("r+b") as file:  # a safetensors file: length of the header, header (JSON), tensors
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        file.write(content)
