"""The interface between the trainer and a sampling engine: token ids in, token ids out. Text is for people only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from vold.config.schema import SamplingConfig
from vold.models.images import ImageProcessor
from vold.types import Prompt, Rollout, TokenIds


class Sampler(Protocol):
    """One engine's copy of the policy.

    images: reads pictures as the policy's processor does; None for a text model.
    """

    images: ImageProcessor | None

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, *, responses: int, seed: int) -> list[Rollout]:
        """`responses` rollouts of each prompt, siblings adjacent, in the prompts' order. The same seed gives the same
        ids."""
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
        """The rollouts of `sample`, one prompt's siblings at a time, in the order they finish.

        A group is complete or missing: a prompt whose requests failed never comes, and the engine logs its id. The
        sampled ids do not depend on the order. Prompts whose ids are in `answered` are left out; the ids of the others
        are the same as if they were not.
        """
        ...

    def score(self, prompt: Prompt, response_ids: TokenIds | Sequence[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of each given response token."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite weights in place, by transformers' names; weights that are left out (a frozen vision tower) stay.

        Every rank calls it, also where only one holds an engine: the stream may be a collective. Tokens sampled
        afterwards carry a `version` one higher. Other threads may be sampling, where the sampler was opened for that
        (`keep_requests` of open_sampler): what they have begun goes on with the new weights.
        """
        ...
