"""Changes of the teacher's log-probs of sampled tokens, by the policy that sampled them and by the rewards.

TOP-D (arXiv 2607.04751): the teacher is mixed with the policy, so that a token which it rejects has a bounded gap,

    p_mix = share p_T + (1 - share) p_S,   log p_mix - log p_S = log(share p_T / p_S + 1 - share) >= log(1 - share)

Uni-OPD (arXiv 2605.03677): a_i, the mean over the tokens of response i of log p_T - log p_S, should be larger for right
responses than for wrong ones of the same prompt, by a margin. Where the difference of the two means is smaller by s,
every token's log p_T - log p_S is raised by s / 2 in right responses and lowered by s / 2 in wrong ones: a policy
gradient with that advantage, and the weight of the KL term. G responses to a prompt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_teacher(logp_teacher: Tensor, logp_sampled: Tensor, share: float) -> Tensor:
    """log p_mix of each token, nats."""
    if share == 1.0:
        return logp_teacher
    return torch.logaddexp(logp_teacher + math.log(share), logp_sampled + math.log1p(-share))


def margin_advantages(gain_G: Sequence[float], right_G: Sequence[float], margin: float) -> list[float]:
    """What is added to log p_T - log p_S in each response: +s/2, -s/2, or 0 for all where the margin is kept, or the
    responses are all right or all wrong. gain_G: a_i. right_G: 1 for a right response; other values count as wrong."""
    right = [gain for gain, success in zip(gain_G, right_G, strict=True) if success == 1.0]
    wrong = [gain for gain, success in zip(gain_G, right_G, strict=True) if success != 1.0]
    if not right or not wrong:
        return [0.0] * len(gain_G)
    shift = max(margin - (statistics.fmean(right) - statistics.fmean(wrong)), 0.0)
    return [shift / 2 if success == 1.0 else -shift / 2 for success in right_G]
