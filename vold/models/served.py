"""A checkpoint of any architecture that vLLM serves, as far as the trainer must know a teacher that runs there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from vold.models.checkpoint_dir import lacks, reading


@dataclass(frozen=True)
class ServedModel:
    """Read from config.json alone.

    vocab           rows of the head
    hidden          width of its hidden states
    image_token_id  the id that an image's tokens have in its prompts; None for a model that reads text only
    """

    vocab: int
    hidden: int
    image_token_id: int | None
    config: PretrainedConfig = field(repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, checkpoint: Path | str) -> ServedModel:
        """Raises ValueError where config.json is missing, or of a model that transformers does not know."""
        path = Path(checkpoint)
        if not (path / "config.json").is_file():
            raise lacks(path, "config.json")
        with reading(path):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        names = ("image_token_id", "image_token_index") if hasattr(config, "vision_config") else ()
        image = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        return cls(text.vocab_size, text.hidden_size, image, config)

    @property
    def dtype(self) -> torch.dtype:
        """In which its weights are stored; float32 where config.json does not say."""
        stored = self.config.dtype
        return stored if isinstance(stored, torch.dtype) else getattr(torch, stored or "float32")

    @property
    def recurrent(self) -> bool:
        """Some of its layers have a recurrent state in the place of keys and values."""
        return "linear_attention" in (getattr(self.config.get_text_config(), "layer_types", None) or ())

    @property
    def sees(self) -> bool:
        """It has a vision tower."""
        return hasattr(self.config, "vision_config")
