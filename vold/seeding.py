"""Seeds derived from where a run is, so that a resumed or differently divided run draws the same random numbers."""

from __future__ import annotations

import numpy as np


def derive_seed(*position: int, bits: int = 32) -> int:
    """A seed of `bits` bits (at most 64) that depends on the given non-negative integers and their order alone.

    Typical positions are (run seed, step, request number). Different positions give independent random streams.
    """
    word = np.uint32 if bits <= 32 else np.uint64
    state = np.random.SeedSequence(position).generate_state(1, word)[0]
    return int(state) >> (np.iinfo(word).bits - bits)
