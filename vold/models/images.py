"""Images as transformers' own processor sees them; shared by sampler and trainer so that both count the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from vold.data.pack import Encoded, Encoder, encode_text
from vold.data.pictures import read_picture
from vold.models.architecture import Architecture
from vold.models.positions import expand_image_tokens, mrope_positions
from vold.records import Prompt


@dataclass(frozen=True)
class ImageInputs:
    """pixel_values [patches, C*T*p*p]; grid_thw int64 [images, 3]."""

    pixel_values: Tensor
    grid_thw: Tensor


class ImageReader:
    """Reads files with the checkpoint's image processor and expands image-pad ids to match."""

    def __init__(self, checkpoint: Path):
        self.arch = Architecture.from_pretrained(checkpoint)
        self._processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)

    @property
    def token_id(self) -> int:
        """The image-pad id."""
        return self.arch.vision.image_token_id

    def read(self, paths: Sequence[Path]) -> ImageInputs:
        """All images of one prompt, in order."""
        out = self._processor(images=[read_picture(path) for path in paths], return_tensors="pt")
        return ImageInputs(out["pixel_values"], out["image_grid_thw"])

    def expand(self, token_ids: Sequence[int], images: ImageInputs) -> tuple[int, ...]:
        """One image-pad id -> one per merged patch. Raises ValueError when pads and images differ in number."""
        return expand_image_tokens(token_ids, images.grid_thw, self.arch)


def image_encoder(reader: ImageReader | None) -> Encoder:
    """How `pack` reads prompts that may hold images; text only without a reader."""
    if reader is None:
        return encode_text

    def encode(prompt: Prompt) -> Encoded:
        if not prompt.images:
            return encode_text(prompt)
        images = reader.read(prompt.images)
        prompt_ids = reader.expand(prompt.token_ids, images)
        positions = mrope_positions(torch.tensor(prompt_ids), images.grid_thw, reader.arch)
        return Encoded(prompt_ids, positions, images.pixel_values, images.grid_thw)

    return encode
