"""Differences of two arms with intervals that hold for other seeds and other problems, and Holm's correction.

Every seed's runs answer the same test problems, so that the answers form a table of seeds by problems, whose rows and
columns are both random. The error of the mean of such a table is that of two crossed random effects without replication
(Searle, Casella, McCulloch: Variance Components, 1992, section 4.3):

    Var(mean) = (MS_seeds + MS_problems - MS_rest) / (seeds * problems),

with Satterthwaite's degrees of freedom for the combination of mean squares. Over seeds alone the interval would hold
for these problems only, and over problems alone for these runs only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mpmath
import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom, in the unit of the data.

    seeds     the same mean, standard error over seeds alone (t with seeds - 1): narrower or wider, for comparison
    """

    mean: float
    stderr: float
    df: float
    seeds: float = math.nan

    @property
    def half_width(self) -> float:
        """Half of the 95 % t interval."""
        return quantile(0.5 + LEVEL / 2, self.df) * self.stderr if self.stderr > 0 else 0.0

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of 0."""
        if self.stderr == 0:
            return 1.0 if self.mean == 0 else 0.0
        return p_value(self.mean / self.stderr, self.df)


def crossed(values_SP: np.ndarray) -> Estimate:
    """The mean over seeds S and problems P with the crossed standard error.

    Raises ValueError with fewer than two seeds or problems.
    """
    seeds, problems = values_SP.shape
    if min(seeds, problems) < 2:
        raise ValueError(f"{seeds} seeds × {problems} problems: an interval needs two of each")
    mean = values_SP.mean()
    by_seed, by_problem = values_SP.mean(1), values_SP.mean(0)
    rest = values_SP - by_seed[:, None] - by_problem + mean
    ms_seeds = problems * by_seed.var(ddof=1)
    ms_problems = seeds * by_problem.var(ddof=1)
    ms_rest = (rest**2).sum() / ((seeds - 1) * (problems - 1))
    df_rest = (seeds - 1) * (problems - 1)
    # A negative variance component is taken as none: the error is at least that of either effect alone.
    total = max(ms_seeds + ms_problems - ms_rest, ms_seeds, ms_problems)
    parts = ms_seeds**2 / (seeds - 1) + ms_problems**2 / (problems - 1) + ms_rest**2 / df_rest
    df = total**2 / parts if parts else math.inf
    over_seeds = math.sqrt(ms_seeds / (seeds * problems))
    return Estimate(float(mean), math.sqrt(total / (seeds * problems)), float(df), over_seeds)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number a seed, with the t interval over seeds."""
    array = np.asarray(values, float)
    stderr = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Estimate(float(array.mean()), stderr, len(array) - 1, stderr)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): each of them below α bounds the chance of any false one in the family by α."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def p_value(t: float, df: float) -> float:
    """Two-sided p-value of Student's t."""
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


@lru_cache
def quantile(probability: float, df: float) -> float:
    """Quantile of Student's t, for probabilities above one half."""
    tail = 2 * (1 - probability)
    high = 2.0
    while p_value(high, df) > tail:
        high *= 2
    return float(mpmath.findroot(lambda t: p_value(float(t), df) - tail, (0.0, high), solver="ridder", tol=1e-12))
