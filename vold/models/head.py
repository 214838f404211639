"""The head of a checkpoint of any architecture, for a teacher whose other layers another engine runs. U rows of this
rank, E hidden width."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vold.models.checkpoint_reader import CheckpointReader
from vold.models.served import ServedModel
from vold.parallel.launch import Layout

# Fields of config.json that say that logits are more than hidden states times the head, with the values that do not.
_LINEAR = {
    "final_logit_softcapping": (None, 0, 0.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}


@torch.no_grad()
def load_head(checkpoint: Path, layout: Layout, dtype: torch.dtype, rows: int) -> Tensor:
    """[U, E] on the layout's device: this tensor-parallel rank's share of a head of `rows` rows, the student's number;
    rows that the checkpoint's head has not are 0. A tied head is its embedding. Raises ValueError naming the field or
    the tensor where logits are not hidden states times a matrix, or the matrix is not there."""
    config = ServedModel.from_pretrained(checkpoint).config
    text = config.get_text_config()
    for name, linear in _LINEAR.items():
        if (value := getattr(text, name, None)) not in linear:
            raise ValueError(
                f"{checkpoint}: {name} = {value} in config.json: its logits are not hidden states times a head, which "
                "whole distributions from an engine need; set objective.divergence=k2"
            )
    share = rows // layout.tp
    start, stop = layout.tp_rank * share, (layout.tp_rank + 1) * share
    with CheckpointReader(checkpoint) as reader:
        if "lm_head.bias" in reader:
            raise ValueError(f"{reader.where('lm_head.bias')} is not supported; set objective.divergence=k2")
        tied = config.tie_word_embeddings or "lm_head.weight" not in reader
        stored = reader.slice("embed_tokens.weight" if tied else "lm_head.weight")
        head_UE = stored[start : min(stop, stored.get_shape()[0])].to(layout.device, dtype)
    missing = share - len(head_UE)
    return torch.cat([head_UE, head_UE.new_zeros(missing, head_UE.shape[1])]) if missing else head_UE
