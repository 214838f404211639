"""Images, prepared by transformers' own processor; sampler and trainer share this file, so that both count the same
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vold.data.packing import EncodedPrompt, PromptEncoder, TextPromptEncoder, encode_text
from vold.data.pictures import picture_size, read_picture, resized
from vold.models.architecture import Architecture
from vold.models.positions import expand_image_tokens, mrope_positions
from vold.types import Picture, Prompt, TokenIds

ImageTransform = Callable[[Image.Image], Image.Image]
"""A change of an image before the model's processor reads it; the size stays."""


class ImageProcessor:
    """Reads image files with a checkpoint's image processor and expands image-pad ids to match.

    transform: applied to every image first; None: images as they are
    """

    def __init__(self, checkpoint: Path, transform: ImageTransform | None = None):
        self.arch, self._transform = Architecture.from_pretrained(checkpoint), transform
        try:
            self._processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{checkpoint} has no image processor: copy preprocessor_config.json from the original checkpoint"
            ) from None
        self.token_count = cache(self._token_count)

    @property
    def token_id(self) -> int:
        """The id of the image-pad token."""
        return self.arch.vision.image_token_id

    def read(self, paths: Sequence[Path]) -> tuple[Picture, ...]:
        """The images of one prompt, in order."""
        return tuple(self._read(path) for path in paths)

    def _read(self, path: Path) -> Picture:
        image, key = read_picture(path), str(path)
        if self._transform is not None:
            image, key = self._transform(image), f"{path} ({self._transform.__name__})"
        image = resized(image, self.size(path))
        out = self._processor(images=[image], return_tensors="pt")
        return Picture(key, out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()))

    def size(self, path: Path) -> tuple[int, int]:
        """(width, height) at which the model reads an image: whole merged patches, within the processor's bounds. Only
        the file's header is read. An image of this size is not resized again, by transformers or by vLLM."""
        width, height = picture_size(path)
        processor, bounds = self._processor, self._processor.size
        height, width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=bounds["shortest_edge"],
            max_pixels=bounds["longest_edge"],
        )
        return width, height

    def _token_count(self, path: Path) -> int:
        """Number of tokens that an image becomes."""
        width, height = self.size(path)
        return width * height // (self._processor.patch_size * self._processor.merge_size) ** 2

    def expand(self, token_ids: TokenIds, pictures: Sequence[Picture]) -> TokenIds:
        """Repeat each image-pad id once per merged patch. Raises ValueError when pads and pictures differ in number."""
        return np.array(expand_image_tokens(token_ids.tolist(), image_grids(pictures), self.arch), np.int32)


def image_grids(pictures: Sequence[Picture]) -> Tensor:
    """int64 [images, 3]: (time, height, width) in patches, as transformers takes them."""
    return torch.tensor([picture.grid_thw for picture in pictures], dtype=torch.int64).view(-1, 3)


class ImagePromptEncoder(TextPromptEncoder):
    """The prompt encoder of a vision-language model: text, with or without images."""

    def __init__(self, processor: ImageProcessor):
        self._processor = processor

    def __call__(self, prompt: Prompt) -> EncodedPrompt:
        if not prompt.images:
            return super().__call__(prompt)
        pictures = self._processor.read(prompt.images)
        prompt_ids = self._processor.expand(prompt.token_ids, pictures)
        input_ids_P = torch.tensor(prompt_ids, dtype=torch.int64)
        positions_3P = mrope_positions(input_ids_P, image_grids(pictures), self._processor.arch)
        return EncodedPrompt(prompt_ids, positions_3P, pictures)

    def length(self, prompt: Prompt) -> int:
        pads = int((prompt.token_ids == self._processor.token_id).sum())
        if pads > len(prompt.images):
            raise ValueError(f"{prompt.id}: {len(prompt.images)} images but {pads} image-pad tokens in its text")
        if pads < len(prompt.images):
            raise ValueError(
                f"{prompt.id}: {len(prompt.images)} images, and its prompt has room for {pads}: the chat template "
                "leaves images out; give prompt.chat_template a directory or .jinja file whose template shows them"
            )
        return len(prompt.token_ids) + sum(self._processor.token_count(path) - 1 for path in prompt.images)


def prompt_encoder(processor: ImageProcessor | None) -> PromptEncoder:
    """The prompt encoder for a model with this image processor; for a text model without one."""
    return encode_text if processor is None else ImagePromptEncoder(processor)


def load_prompt_encoder(checkpoint: Path, transform: ImageTransform | None = None) -> PromptEncoder:
    """The prompt encoder of the model in a checkpoint directory."""
    has_vision = Architecture.from_pretrained(checkpoint).vision is not None
    return prompt_encoder(ImageProcessor(checkpoint, transform) if has_vision else None)
