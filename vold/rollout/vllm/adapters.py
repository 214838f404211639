"""The policy as a LoRA adapter in vLLM: megabytes travel, and the engine's base stays.

vLLM goes wrong without a word where an adapter is replaced in place (prefixes cached with the old one are used on) and
where every slot is taken (rows of the base are computed with an adapter). So each version has a name, a number and a
folder of its own, and there is a slot more than the two versions that are there while one follows the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vold.config.schema import AdapterConfig
from vold.models.adapters import PROJECTIONS
from vold.models.peft_directory import write_adapter
from vold.rollout.vllm.guard import ADAPTER_FOLDER

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest rank of an engine is one of these."""
SLOTS = 3


@dataclass(frozen=True)
class EngineAdapter:
    """What an engine that gets adapters has to know of them. base: the checkpoint that it serves."""

    config: AdapterConfig
    base: Path

    @property
    def options(self) -> dict[str, Any]:
        """vLLM's engine arguments. Modules are named: unasked vLLM 0.32 wraps the head too, which then has no log-probs
        of prompts."""
        modules = [name for target in self.config.targets for name in PROJECTIONS[target]]
        rank = next(rank for rank in RANKS if rank >= self.config.rank)
        return {"enable_lora": True, "max_loras": SLOTS, "max_lora_rank": rank, "lora_target_modules": modules}

    def write(self, named_weights: Iterable[tuple[str, Tensor]], folder: Path) -> Path:
        """Write one version's matrices (by peft's names) into a folder of its own; its path."""
        write_adapter(folder / ADAPTER_FOLDER, self.base, self.config, named_weights)
        return folder / ADAPTER_FOLDER
