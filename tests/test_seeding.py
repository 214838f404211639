"""Seeds are functions of the position alone; runs that were saved before derived them by numpy as written out here."""

from __future__ import annotations

import numpy as np

from vold.seeding import derive_seed


def test_seeds_are_numpys():
    sequence = np.random.SeedSequence([3, 1, 4])
    assert derive_seed(3, 1, 4) == int(sequence.generate_state(1)[0])
    assert derive_seed(3, 1, 4, bits=30) == int(sequence.generate_state(1)[0] >> 2)
    large = 2**40 + 5
    assert derive_seed(large, bits=62) == int(np.random.SeedSequence(large).generate_state(1, np.uint64)[0] >> 2)


def test_every_position_has_its_own_seed():
    seeds = {derive_seed(*position) for position in np.ndindex(4, 5, 6)}
    assert len(seeds) == 120
