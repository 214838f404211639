"""What the trainer needs of a sampling engine. Token ids in, token ids out; text is for people only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from vold.config.schema import SamplingConfig
from vold.models.images import ImageProcessor
from vold.types import Prompt, Rollout


class Sampler(Protocol):
    """One engine's copy of the policy. `images` reads pictures as the policy sees them; None for a text model."""

    images: ImageProcessor | None

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """`responses` rollouts of each prompt, siblings adjacent, order kept. The same seed gives the same ids."""
        ...

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        responses: int,
        seed: int,
        answered: Collection[str] = (),
    ) -> Iterator[list[Rollout]]:
        """The same rollouts, the siblings of one prompt at a time, in the order they finish. A group is complete or
        does not come: a prompt that never comes was lost, and the engine has named it. What is drawn does not depend
        on the order. Prompts whose ids are `answered` do not come; the others draw as if they did."""
        ...

    def score(self, prompt: Prompt, response_ids: Sequence[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of each given response token."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite weights in place, by transformers' names; those left out (a frozen vision tower) stay. Every
        rank calls it, also where only one holds an engine: the stream may be a collective. Rollouts drawn afterwards
        carry a `version` one higher."""
        ...
