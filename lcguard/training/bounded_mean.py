"""An upper bound on the mean of numbers in 0..1, exact at any sample size.

By betting (Waudby-Smith and Ramdas, arXiv 2010.09686): who holds that the mean is ``m`` may bet at
fair odds that it is lower, and the stake multiplies by ``1 - b (x - m)`` with each number x, the
size b of a bet depending on earlier numbers alone. Where m is the mean the capital is a martingale
that stays above 0, so by Ville's inequality it reaches ``1 / (1 - level)`` with a probability of at
most ``1 - level``, whatever the law of the numbers. The bound is the largest m not given up so.
Nothing is asymptotic, and numbers of small variance are bounded closely, as Student's t would do
where it may not. They have to be independent and of one mean; their order must not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_GRID = 1000
_BOLDEST = 0.75
"""Share of the capital that one number can cost."""


def mean_upper_bound(values: Sequence[float], level: float) -> float:
    """1 where there are no values.

    Raises ``ValueError`` for values outside 0..1 or a level outside 0.5..1.
    """
    x = np.asarray(values, dtype=float)
    if not 0.5 <= level < 1:
        raise ValueError(f"level={level} must be at least 0.5 and below 1")
    if not ((x >= 0) & (x <= 1)).all():  # NaN fails both
        raise ValueError("a value is not within 0..1: its mean has no bound here")
    if not len(x):
        return 1.0
    # regularised mean and variance of the numbers before each
    seen = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (seen + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (seen + 1)
    before = np.concatenate(([0.25], variance[:-1]))
    bets = np.sqrt(2 * math.log(1 / (1 - level)) / (before * len(x)))
    m = np.linspace(0.0, 1.0, _GRID + 1)[:-1, None]  # a mean of 1 is never given up
    size = np.minimum(bets, _BOLDEST / (1 - m))  # x - m is at most 1 - m
    most = np.cumsum(np.log1p(-size * (x - m)), axis=1).max(1)
    kept = np.flatnonzero(most < math.log(1 / (1 - level)))
    # up to the next point of the grid, which is given up
    return min(1.0, float(m[kept[-1], 0]) + 1 / _GRID)  # a mean of 0 is never given up either
