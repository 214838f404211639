"""Reading the tensors of a checkpoint directory, and the checks of its names and sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vold.models.architecture import Architecture
from vold.models.checkpoint_dir import open_tensors, reading, short_name, tensor_files
from vold.models.joined import joining_architecture, parts_of, weight_rows
from vold.models.weight_rules import text_tensors

STORED_FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names; anything else needs scales that are not read
NOT_WEIGHTS = "rotary_emb.inv_freq"  # a buffer that old checkpoints stored; transformers leaves it out too


class CheckpointReader:
    """Tensors of a checkpoint directory by their short name, whichever spelling the files use. A context manager, which
    closes the files."""

    def __init__(self, checkpoint_dir: str | Path):
        self.dir = Path(checkpoint_dir)
        self._file_of = tensor_files(self.dir)
        self._full_name = {short_name(name): name for name in self._file_of}
        self._part_of: dict[str, Callable[[Any], Any]] = {}  # of a part of a joined tensor: from the tensor's slice
        if (arch := joining_architecture(self.dir)) is not None:
            for name in list(self._full_name):
                if parts := parts_of(name, arch):
                    full_name = self._full_name.pop(name)
                    self._full_name |= dict.fromkeys(parts, full_name)
                    self._part_of |= parts
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_exception) -> None:
        self._handles.clear()
        self._open_files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._full_name

    def slice(self, name: str):
        """A lazily read safetensors slice. Raises ValueError naming the tensor and the directory when missing."""
        if name not in self:
            raise ValueError(f"{self.dir}: tensor {name} is missing: the checkpoint is incomplete or of another model")
        full_name = self._full_name[name]
        file = self._file_of[full_name]
        if file not in self._handles:
            self._handles[file] = self._open_files.enter_context(open_tensors(self.dir / file))
        with reading(self.dir / file):
            stored = self._handles[file].get_slice(full_name)
        return self._part_of[name](stored) if name in self._part_of else stored

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError naming the tensor and its file when it is missing or has another shape."""
        part = self.slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(f"{self.where(name)} has shape {tuple(part.get_shape())} but config.json asks for {shape}")
        if part.get_dtype() not in STORED_FLOATS:
            raise ValueError(f"{self.where(name)} is {part.get_dtype()}, quantised: give the unquantised checkpoint")

    def check_names(self, arch: Architecture) -> None:
        """Raises ValueError naming a tensor that a model of this architecture would leave out, so that transformers or
        vLLM could compute with what the trainer has not read; a head beside `tied` must equal its embedding."""
        read = text_tensors(arch)
        for name in self._full_name:
            known = name in read or name.endswith(NOT_WEIGHTS) or name.startswith(arch.family.left_out)
            known = known or (arch.vision and name.startswith("visual."))
            if not known:
                model = f"the {arch.model_type} of {arch.layers} layers"
                raise ValueError(f"{self.where(name)} is no part of {model} in config.json: correct one of the two")
        if arch.tied and "lm_head.weight" in self and not self._equal("lm_head.weight", "embed_tokens.weight"):
            raise ValueError(
                f"{self.where('lm_head.weight')} differs from the embedding, but config.json says tie_word_embeddings "
                "true: set it to false to keep this head, or delete the tensor"
            )

    def _equal(self, one: str, other: str, rows: int = 16384) -> bool:
        first, second = self.slice(one), self.slice(other)
        if first.get_shape() != second.get_shape():
            return False
        starts = range(0, first.get_shape()[0], rows)
        return all(torch.equal(first[start : start + rows], second[start : start + rows]) for start in starts)

    def where(self, name: str) -> str:
        """The tensor's file and full name, for an error line."""
        full_name = self._full_name[name]
        return f"{self.dir / self._file_of[full_name]}: tensor {full_name}"


def _mlp_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Of a layer's MLP, or of its router and its last expert: short name in the layer -> shape."""
    prefix, router = "mlp", {}
    if arch.mixture is not None:
        prefix = f"mlp.experts.{arch.mixture.experts - 1}"
        router = {"mlp.gate.weight": (arch.mixture.experts, arch.hidden)}
    gate, down = (arch.ffn, arch.hidden), (arch.hidden, arch.ffn)
    return {**router, f"{prefix}.gate_proj.weight": gate, f"{prefix}.down_proj.weight": down}


def _first_mixer(arch: Architecture) -> tuple[str, int]:
    """The name in layer 0, and the rows, of the keys' projection, or of a gated delta net's gate."""
    name = "linear_attn.in_proj_z.weight" if arch.is_delta_net(0) else "self_attn.k_proj.weight"
    return name, weight_rows(name, arch)


def check_sizes(checkpoint_dir: str | Path) -> None:
    """Raises ValueError where config.json asks for another model than the files hold, before memory is taken for it."""
    arch = Architecture.from_pretrained(checkpoint_dir)
    last, (name, rows) = f"layers.{arch.layers - 1}", _first_mixer(arch)
    with CheckpointReader(checkpoint_dir) as reader:
        reader.check_shape("embed_tokens.weight", (arch.vocab, arch.hidden))
        reader.check_shape(f"layers.0.{name}", (rows, arch.hidden))
        for name, shape in _mlp_shapes(arch).items():
            reader.check_shape(f"layers.0.{name}", shape)
            reader.check_shape(f"{last}.{name}", shape)


def check_names(checkpoint_dir: str | Path) -> None:
    """Raises ValueError as `CheckpointReader.check_names` does, from the files' headers (and a tied head's rows), or as
    `check_sizes`."""
    check_sizes(checkpoint_dir)
    with CheckpointReader(checkpoint_dir) as reader:
        reader.check_names(Architecture.from_pretrained(checkpoint_dir))
