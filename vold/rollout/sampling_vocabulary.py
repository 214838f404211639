"""The tokens that may be sampled from a checkpoint's model, and how sampled ids become a Rollout, in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from vold.models.checkpoint_dir import reading
from vold.models.tokenizer import load_tokenizer
from vold.types import Prompt, Rollout


@dataclass(frozen=True)
class SamplingVocabulary:
    """The sampler's token ids.

    size        ids below it may be sampled: the tokenizer's; the model's head may have more rows
    banned_ids  ids below `size` that are never sampled
    stop_ids    each of them ends a response
    """

    size: int
    banned_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> SamplingVocabulary:
        """The tokenizer's ids without the image pad. Stop ids are the generation config's list (Qwen3 has two), or the
        tokenizer's end token."""
        tokenizer = load_tokenizer(checkpoint)
        with reading(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            stop = _generation_config(checkpoint, config).eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        return cls(
            size=len(tokenizer),
            banned_ids=(config.image_token_id,) if hasattr(config, "vision_config") else (),
            stop_ids=tuple(stop) if isinstance(stop, list | tuple) else (stop,),
            tokenizer=tokenizer,
        )

    def make_rollout(self, prompt: Prompt, ids: Sequence[int], logps: Sequence[float], *, version: int) -> Rollout:
        """The response up to and with its first stop token; what follows that is padding, whatever its ids are."""
        stops = [index for index, token in enumerate(ids) if token in self.stop_ids]
        length = stops[0] + 1 if stops else len(ids)
        return Rollout(
            prompt=prompt,
            response_ids=ids[:length],
            logp_rollout=logps[:length],
            finish_reason="stop" if stops else "length",
            text=self.tokenizer.decode(ids[: length - bool(stops)], skip_special_tokens=True),
            version=version,
        )


def _generation_config(checkpoint: Path, config) -> GenerationConfig:
    if (checkpoint / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    return GenerationConfig.from_model_config(config)
