"""The frozen vision tower: transformers' own module, outside the trained model, its optimiser and its checkpoints.

I image tokens (merged patches of all images), D hidden width of the text model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vold.models.checkpoint_dir import tensor_files

VISION_PREFIXES = ("visual.", "model.visual.")


class FrozenVisionTower:
    """Pixels in, features of the text model's width out. Deliberately no nn.Module: nothing can register it.

    Identical on every tensor-parallel rank; needed on the first pipeline stage only.
    """

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel):
        self._tower = tower.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, checkpoint_dir: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> FrozenVisionTower | None:
        """Load the tower alone, reading only its tensors; None when the checkpoint is a text-only model."""
        path = Path(checkpoint_dir)
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if not hasattr(config, "vision_config"):
            return None
        with no_init_weights():
            tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config, dtype=dtype)
        tower.load_state_dict(_vision_tensors(path, set(tower.state_dict())))
        return cls(tower.to(device))

    @torch.no_grad()
    def features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """pixel_values [patches, channels * t * p * p], image_grid_thw int64 [images, 3] -> features_ID [I, D]."""
        reference = next(self._tower.parameters())
        pixels = pixel_values.to(reference.device, reference.dtype)
        return self._tower(pixels, grid_thw=image_grid_thw.to(reference.device)).pooler_output

    def state_dict(self) -> dict[str, Tensor]:
        """For tests and fingerprints: the tower's tensors without a prefix."""
        return self._tower.state_dict()


def _vision_tensors(path: Path, expected: set[str]) -> dict[str, Tensor]:
    """{name without prefix: tensor}; ValueError naming the first missing one."""
    tensors = {}
    names_by_file: dict[str, list[str]] = {}
    for name, file in tensor_files(path).items():
        if name.startswith(VISION_PREFIXES):
            names_by_file.setdefault(file, []).append(name)
    for file, names in names_by_file.items():
        with safe_open(path / file, framework="pt", device="cpu") as handle:
            tensors |= {name.split("visual.", 1)[1]: handle.get_tensor(name) for name in names}
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(f"{path}: tensor visual.{missing[0]} is missing: the checkpoint is incomplete")
    return tensors
