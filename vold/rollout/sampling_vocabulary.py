"""The tokens that may be sampled from a checkpoint's model, and how sampled ids become a Rollout, in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from vold.data.responses import open_thought
from vold.models.checkpoint_dir import reading
from vold.models.tokenizer import id_bound, load_tokenizer, stop_ids
from vold.types import Prompt, Rollout


@dataclass(frozen=True)
class SamplingVocabulary:
    """The sampler's token ids.

    size        ids below it may be sampled: the tokenizer's; the model's head may have more rows
    banned_ids  ids below `size` that are never sampled: the image pad, and those without a token
    stop_ids    each of them ends a response
    """

    size: int
    banned_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> SamplingVocabulary:
        """The tokenizer's ids, and the ends that the checkpoint's files name (`vold.models.tokenizer: stop_ids`)."""
        tokenizer = load_tokenizer(checkpoint)
        with reading(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        size = id_bound(tokenizer)
        banned = set(range(size)) - set(tokenizer.get_vocab().values())
        if hasattr(config, "vision_config"):
            banned.add(config.image_token_id)
        return cls(size, tuple(sorted(banned)), stop_ids(checkpoint, tokenizer), tokenizer)

    @property
    def pad_id(self) -> int:
        """The id in front of shorter prompts; nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else pad

    def make_rollout(
        self, prompt: Prompt, ids: Sequence[int], logps: Sequence[float], *, version: int | Sequence[int]
    ) -> Rollout:
        """The response up to and with its first stop token; what follows that is padding, whatever its ids are. Its
        text has every token but end and pad, and begins with the `<think>` that the prompt has opened. version: of all
        tokens, or of each."""
        stops = [index for index, token in enumerate(ids) if token in self.stop_ids]
        length = stops[0] + 1 if stops else len(ids)
        unread = {*self.stop_ids, self.tokenizer.pad_token_id}
        of_tokens = [version] if isinstance(version, int) else list(version[:length])
        written = [*open_thought(prompt.token_ids, self.tokenizer), *(i for i in ids[:length] if i not in unread)]
        return Rollout(
            prompt=prompt,
            response_ids=ids[:length],
            logp_rollout=logps[:length],
            finish_reason="stop" if stops else "length",
            text=self.tokenizer.decode(written),
            version=min(of_tokens),
            versions=of_tokens if len(set(of_tokens)) > 1 else None,
        )
