"""`vold convert`: a GGUF file as a checkpoint directory that vold, transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

import torch

from vold.io import log
from vold.models.gguf_model import convert_gguf, open_gguf
from vold.models.gguf_tokenizer import gguf_tokenizer


def convert(gguf: Path, out: Path, *, dtype: str, tokenizer: Path | None) -> None:
    """Write checkpoint directory `out`: config, generation config, tokenizer, chat template and dequantised weights.

    Raises ValueError naming what the file holds and such a checkpoint could not.
    """
    file = open_gguf(gguf)
    words = gguf_tokenizer(file, tokenizer)
    config = convert_gguf(file, out, getattr(torch, dtype), words.save_pretrained)
    if words.chat_template is None:
        log.warning(f"{gguf} has no chat template: prompts need {out}/chat_template.jinja")
    log.info(f"{out}: {config.architectures[0]}, {len(file.tensors)} tensors in {dtype}, stops {config.eos_token_id}")
