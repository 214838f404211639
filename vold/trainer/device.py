"""Moving records between devices."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from vold.types import Batch, MicroBatch, PackedTokens


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """Every tensor on `device`."""
    return Batch(tuple(micro_batch_to(micro, device) for micro in batch.micro_batches))


def micro_batch_to(record: MicroBatch | PackedTokens, device: torch.device):
    """The same record with every tensor on `device`."""
    moved = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, PackedTokens):
            moved[field.name] = micro_batch_to(value, device)
    return replace(record, **moved)
