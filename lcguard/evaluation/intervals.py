"""Intervals: Wilson's for a count, a bootstrap over whole clusters for anything else.

The fields of one document stand or fall together, so whole documents are resampled (Field and
Welsh, J. R. Stat. Soc. B 69, 2007). A bootstrap of nothing but failures is a point at zero, which
claims far too much: 0 of 30 is compatible with 11%. There the Wilson interval (J. Am. Stat. Assoc.
22, 1927) over documents is given instead.

By hand and not by SciPy: its bootstrap resamples rows, not clusters as weights on their counts, and
would draw other samples from the same seed; its Wilson interval costs the proxy half a second of
imports for five lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Resampled weights are drawn in blocks of at most this many numbers (32 MB).
_BLOCK = 4_000_000


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A share in 0..1 (or a mean) with its interval."""

    value: float | None
    """None where nothing was scorable."""
    ci: tuple[float, float] | None
    """None where fewer than two clusters leave nothing to resample."""
    n: int
    """Values that entered."""
    n_clusters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a share; ``(0, 1)`` where n is 0: nothing is known.

    Raises ``ValueError`` unless 0 <= successes <= n and 0 < level < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: give 0 <= successes <= n")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1: give 0.95 for 95%")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, shrink = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    # Rounding must not push an end past 0, 1 or the share itself.
    low = 0.0 if successes == 0 else min(max(0.0, centre - half), share)
    high = 1.0 if successes == n else max(min(1.0, centre + half), share)
    return Interval(low, high)


def upper_bound(successes: int, n: int, level: float = 0.95) -> float:
    """Largest share that the count still allows: 0.114 for 0 of 30, and 1 for 0 of 0."""
    return wilson(successes, n, level).high


def zero_success_caveat(successes: int, n: int, level: float = 0.95) -> str | None:
    """What must stand beside an ASR of zero; None where there were successes."""
    if successes:
        return None
    if n == 0:
        return "nothing was scorable: no claim"
    return f"0 of {n} still allows {upper_bound(0, n, level):.1%}"


def cluster_bootstrap(
    values: Sequence[float] | Floats,
    clusters: Sequence[object],
    seed: int = 0,
    n_boot: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Mean with a percentile interval from resampling whole clusters.

    ``values[i]`` belongs to cluster ``clusters[i]`` (a document, a scenario). Where all values
    are 0, or all are 1, the interval is Wilson's with the clusters as trials.

    Raises ``ValueError`` where lengths differ or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) != len(clusters):
        raise ValueError(
            f"values of shape {array.shape} for {len(clusters)} clusters: give one cluster a value"
        )
    if not np.isfinite(array).all():
        raise ValueError("a value is NaN or infinite: leave out what was not scorable")
    if not len(array):
        return Estimate(None, None, 0, 0)
    rows = codes(clusters)
    n_clusters = int(rows.max()) + 1
    total, size = np.bincount(rows, array), np.bincount(rows).astype(np.float64)

    def mean(weights: Floats) -> Floats:
        return np.asarray((weights @ total) / (weights @ size), dtype=np.float64)

    value = float(array.mean())
    ci = percentile_interval(
        mean,
        value,
        constant=bool(np.ptp(array) == 0),
        n_clusters=n_clusters,
        seed=seed,
        n_boot=n_boot,
        level=level,
    )
    return Estimate(value, ci, len(array), n_clusters)


def codes(labels: Sequence[object]) -> NDArray[np.intp]:
    """Labels as 0, 1, 2, … in order of first appearance: independent of Python's hash seed."""
    seen: dict[object, int] = {}
    return np.fromiter((seen.setdefault(x, len(seen)) for x in labels), np.intp, len(labels))


def percentile_interval(
    statistic: Callable[[Floats], Floats],
    value: float,
    *,
    constant: bool,
    n_clusters: int,
    seed: int,
    n_boot: int,
    level: float,
) -> tuple[float, float] | None:
    """Percentile interval; ``statistic`` maps weights ``[n, clusters]`` to ``[n]``."""
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"n_boot {n_boot}, level {level}: give n_boot >= 1 and 0 < level < 1")
    if constant and value in (0.0, 1.0):
        return wilson(n_clusters if value else 0, n_clusters, level)
    if n_clusters < 2:
        return None
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n_clusters)
    drawn = [
        statistic(_resample(rng, min(block, n_boot - i), n_clusters))
        for i in range(0, n_boot, block)
    ]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resample(rng: np.random.Generator, n: int, n_clusters: int) -> Floats:
    """How often each cluster is drawn in each of n resamples: ``[n, clusters]``."""
    picks = rng.integers(0, n_clusters, (n, n_clusters))
    picks += np.arange(n)[:, None] * n_clusters
    times = np.bincount(picks.ravel(), minlength=n * n_clusters)
    return times.reshape(n, n_clusters).astype(np.float64)
