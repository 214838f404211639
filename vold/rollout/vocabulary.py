"""What a checkpoint's model may draw, and how drawn ids become a Rollout: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from vold.models.checkpoint_dir import reading
from vold.models.tokenizer import load_tokenizer
from vold.types import Prompt, Rollout


@dataclass(frozen=True)
class Vocabulary:
    """What may be drawn: ids below `real` that are not `banned`; one of `stop` ends a response."""

    real: int
    banned: tuple[int, ...]
    stop: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, checkpoint: Path) -> Vocabulary:
        """The tokenizer's ids without the image pad; stops are the generation config's list (Qwen3 has two), or the
        tokenizer's end token."""
        tokenizer = load_tokenizer(checkpoint)
        with reading(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            stop = _generation_config(checkpoint, config).eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        return cls(
            real=len(tokenizer),
            banned=(config.image_token_id,) if hasattr(config, "vision_config") else (),
            stop=tuple(stop) if isinstance(stop, list | tuple) else (stop,),
            tokenizer=tokenizer,
        )

    def rollout(self, prompt: Prompt, ids: Sequence[int], logps: Sequence[float], *, version: int) -> Rollout:
        """The length is where the first stop token stands, never where padding seems to begin."""
        stops = [place for place, token in enumerate(ids) if token in self.stop]
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
