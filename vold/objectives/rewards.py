"""Changes to the rewards of a group before its advantages are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (Eq. 13): 0, then growing linearly to `maximum` over the last `share` of the
    sampling limit (a fifth: 4096 of 20480). DAPO subtracts up to 1 from rewards of +-1, half their range; ours lie in
    [0, 1]: 1/2."""

    share: float = 0.2
    maximum: float = 0.5

    def __call__(self, length: int, max_response_tokens: int) -> float:
        """The amount to subtract from the reward of a response of `length` tokens."""
        last = self.share * max_response_tokens
        return self.maximum * min(max(length - (max_response_tokens - last), 0.0) / last, 1.0)
