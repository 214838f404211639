"""What vLLM has to be told, and what its CPU build lacks, for a model with recurrent layers (Qwen3.5, Qwen3-Next)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vold.models.served import ServedModel

CPU_WIDTH = 32
"""vLLM's CPU kernel takes heads of a multiple of this."""


def recurrent_options(checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Engine arguments of a model with recurrent layers; none for others, nor
    without a config.json, which vLLM itself asks for. Raises ValueError for one that vLLM cannot
    run on this machine.

    No prefix cache: vLLM keeps a recurrent state at the ends of a prompt's parts alone, and only where prompts are read
    in parts. A tied head by the name that vLLM reads: transformers writes it beside the text model's settings, and with
    the text model's own default vLLM would compute with a head that was never loaded.
    """
    if not (checkpoint / "config.json").is_file():
        return {}
    model = ServedModel.from_pretrained(checkpoint)
    if not model.recurrent:
        return {}
    if not torch.cuda.is_available():
        _check_cpu(model, dtype)
    options: dict[str, Any] = {"enable_prefix_caching": False}
    text, tied = model.config.get_text_config(), bool(model.config.tie_word_embeddings)
    if text is not model.config and bool(getattr(text, "tie_word_embeddings", tied)) != tied:
        options["hf_overrides"] = {"text_config": {"tie_word_embeddings": tied}}
    return options


def _check_cpu(model: ServedModel, dtype: str) -> None:
    kind = model.config.model_type
    if dtype not in ("bfloat16", "auto"):
        raise ValueError(f"dtype = {dtype}: vLLM on a CPU runs {kind}'s recurrent layers in bfloat16 alone; set it so")
    text = model.config.get_text_config()
    for name in ("linear_key_head_dim", "linear_value_head_dim"):
        width = getattr(text, name, CPU_WIDTH)
        if width % CPU_WIDTH:
            raise ValueError(
                f"{name} {width} of {kind}: vLLM on a CPU takes multiples of {CPU_WIDTH}; use engine transformers"
            )
