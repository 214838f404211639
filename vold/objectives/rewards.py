"""What is done to the rewards of a group before its advantages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (Eq. 13): nothing, then linearly up to `most` over the last `share` of the
    budget (a fifth: 4096 of 20480). DAPO takes 1 off rewards of +-1, half their range; ours lie in [0, 1]: 1/2."""

    share: float = 0.2
    most: float = 0.5

    def __call__(self, length: int, longest: int) -> float:
        """To be subtracted from the reward of a response of `length` tokens where `longest` may be sampled."""
        last = self.share * longest
        return self.most * min(max(length - (longest - last), 0.0) / last, 1.0)
