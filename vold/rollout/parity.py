"""The parity probe: after every weight sync, sampler and trainer must agree on a few fixed sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vold.data.packing import PromptEncoder, pack
from vold.rollout.sampler import Sampler
from vold.types import Batch, Diverged, Prompt, Sample, TokenIds

TrainerLogprobs = Callable[[Batch], dict[int, list[float]]]


class ParityProbe:
    """Fixed (prompt, response ids) pairs that sampler and trainer both score.

    limit: the greatest allowed mean of exp|logp difference| over the tokens, e.g. 1.05.
    """

    def __init__(
        self, sequences: Sequence[tuple[Prompt, TokenIds | Sequence[int]]], encode: PromptEncoder, limit: float
    ):
        samples = [Sample(prompt, response, 1.0, 1.0, 0.0) for prompt, response in sequences]
        self._sequences, self._limit = samples, limit
        self._batch = pack(samples, max_tokens=1 << 30, encode=encode)

    def check(self, sampler: Sampler, trainer_logprobs: TrainerLogprobs) -> dict[str, float]:
        """`parity_error`, the mean of exp|logp sampler - logp trainer| over all tokens, and `parity_max`, the greatest
        difference in nats. Raises ValueError where the error exceeds the limit, Diverged where log-probs are
        not finite."""
        logp_trainer = trainer_logprobs(self._batch)
        pairs = [
            pair
            for index, sample in enumerate(self._sequences)
            for pair in zip(sampler.score(sample.prompt, sample.response_ids), logp_trainer[index], strict=True)
        ]
        for which, logps in zip(("sampler", "trainer"), zip(*pairs, strict=True), strict=True):
            if not all(map(math.isfinite, logps)):
                raise Diverged(
                    f"the {which}'s log-probs are NaN or infinite after a weight sync: weights overflowed; --resume "
                    "from the last checkpoint with a lower optimizer.lr or clip_grad"
                )
        gaps = [abs(a - b) for a, b in pairs]
        error = sum(math.exp(min(gap, 50.0)) for gap in gaps) / len(gaps)
        if not error <= self._limit:
            raise ValueError(
                f"sampler and trainer disagree after a weight sync: mean exp|logp difference| = {error:.4f}, "
                f"parity_limit = {self._limit}; the sampler's weights are stale or its model differs"
            )
        return {"parity_error": error, "parity_max": max(gaps)}
