"""What one draw of a guarded segment can tell about the secrets, in nats, and what that allows.

For a guard whose mean falls on grid points k (``lcguard.grid``), the KL divergence between the
segments of two contexts is ``||k(raw) - k(raw')||^2 / 2 S^2``: exact for the discrete noise that is
drawn, of S = 1024 steps. Its expectation over contexts that differ in
resampled forbidden secrets alone bounds the mutual information between the secrets and one draw of
the segment, given the rest of the text and the secrets' lengths (convexity of KL). Data processing
(Fano's inequality in its binary form) then bounds any attacker's success p:
``kl(p || p0) <= I``, with p0 the best blind guess.

The bound on the mean uses Student's t, so it is asymptotic in the number of pairs; the tail is
printed beside it. It says nothing about records unlike the held-out ones, about lengths, or about
several draws of one segment.

That is all of a record's secrets at once, and a mean that the tail makes. Where the values' law is
known, ``lcguard.training.secret_ceiling`` bounds how often one secret is named, exactly; the
certificate then leads with its figure.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lcguard.discrete_gaussian import STEPS
from lcguard.grid import to_grid
from lcguard.guards.base import GuardModule
from lcguard.records import TokenRecord, masks
from lcguard.source import ModelSource
from lcguard.training.known_values import KnownValues
from lcguard.training.objective import pair_leak_nats
from lcguard.training.secret_ceiling import GUESS, REFERENCES, secret_ceilings
from lcguard.training.twins import ValuePool, forbidden_spans


@dataclass(frozen=True)
class Certificate:
    mean_nats: float
    upper_nats: float
    """One-sided upper confidence bound on the mean."""
    level: float
    median_nats: float
    p99_nats: float
    max_nats: float
    raw_nats: float
    """The same for the unguarded KV with the guard's noise."""
    n_pairs: int
    blind_guess: float
    """p0 of the ceiling: mean over fields of the most frequent value's share, or, where ``secrets``
    are given, the mean of what is granted for each, ``GUESS`` at least."""
    asr_ceiling: float
    """No attacker recovers a given secret more often than this, at the upper bound, in expectation
    over records like these: per secret where ``secrets`` are given, else by way of all nats."""
    vacuous: bool
    """True where the ceiling says nothing: 0.9 or more."""
    secrets: dict[str, Any] | None = None
    """What ``secret_ceilings`` found; None where the values' law is not known."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def binary_kl(p: float, q: float) -> float:
    """KL divergence in nats between two coins."""
    out = 0.0
    for a, b in ((p, q), (1 - p, 1 - q)):
        if a > 0:
            out += a * math.log(a / b) if b > 0 else math.inf
    return out


def success_ceiling(nats: float, blind_guess: float) -> float:
    """Largest p with ``kl(p || p0) <= nats``, by bisection.

    Raises ``ValueError`` for a negative information or a p0 outside 0..1.
    """
    if not nats >= 0 or not 0 <= blind_guess <= 1:  # NaN fails both
        raise ValueError(f"nats={nats} must be >= 0 and blind_guess={blind_guess} within 0..1")
    p0 = min(max(blind_guess, 1e-6), 1.0)
    low, high = p0, 1.0
    if binary_kl(1.0, p0) <= nats:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(middle, p0) <= nats else (low, middle)
    return low


def upper_bound(values: Sequence[float], level: float) -> float:
    """One-sided upper confidence bound on the mean, by Student's t.

    Raises ``ValueError`` for values that are not finite or a level outside 0.5..1.
    """
    x = np.asarray(values, dtype=float)
    if not 0.5 <= level < 1:
        raise ValueError(f"level={level} must be at least 0.5 and below 1")
    if not np.isfinite(x).all():
        raise ValueError("a pair leak is not finite: nothing can be certified")
    if len(x) < 2:
        return math.inf
    return float(x.mean() + _student(level, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def _student(level: float, degrees: int) -> float:
    """Quantile of Student's t by bisection of its distribution function."""
    # P(T > t) = I_x(n/2, 1/2) / 2 with x = n / (n + t^2), here as the integral over the angle
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (degrees - 1)
    below = 0.5 + 0.5 * np.concatenate(
        ([0.0], np.cumsum((density[1:] + density[:-1]) / 2))
    ) / np.sum((density[1:] + density[:-1]) / 2)
    return float(math.sqrt(degrees) * math.tan(float(np.interp(level, below, angle))))


def blind_guess(records: Sequence[TokenRecord]) -> float:
    """Mean over forbidden fields of their most frequent value's share.

    Only fields with 20 values or more count; 1.0 (any ceiling is vacuous) where there is none.
    """
    values: dict[str, Counter[tuple[int, ...]]] = {}
    for r in records:
        for s in forbidden_spans(r, r.forbid):
            values.setdefault(s.field, Counter())[r.ids[s.start : s.end]] += 1
    shares = [c.most_common(1)[0][1] / c.total() for c in values.values() if c.total() >= 20]
    return float(np.mean(shares)) if shares else 1.0


@torch.no_grad()
def pair_leaks(
    module: GuardModule,
    records: Sequence[TokenRecord],
    pool: ValuePool,
    source: ModelSource,
    seed: int,
    batch: int = 64,
    raw: bool = False,
) -> list[float]:
    """Nats per held-out pair, through the whole guard (or, with ``raw``, past it)."""
    rng, out = random.Random(seed), []
    for first in range(0, len(records), batch):
        part = records[first : first + batch]
        contexts = [r.ids for r in part] + [pool.resample(rng, r, r.forbid, r.derive) for r in part]
        kv, mask, n = source.prefill(contexts), masks(part), len(part)
        means = []
        for half in (kv[:n], kv[n:]):
            z = module.standardise(half)
            mean = z if raw else module.rewrite(z, half.valid, mask).mean
            means.append(to_grid(mean, module.config.noise).double())
        out += pair_leak_nats(means[0], means[1], kv[:n].valid, STEPS).tolist()
    return out


def certify(
    module: GuardModule,
    records: Sequence[TokenRecord],
    source: ModelSource,
    *,
    level: float = 0.95,
    seed: int = 0,
    known: KnownValues | None = None,
    references: int = REFERENCES,
    pairs: int | None = None,
) -> Certificate | None:
    """Certificate on held-out records under their own policies; None for a guard without noise.

    Args:
        known: what values are like, not from these records: gives ceilings for single secrets.
        references: contexts that each of these is compared with.
        pairs: records for the nats of whole records, all by default; secrets are of all.

    Raises ``ValueError`` where no record has a forbidden value.
    """
    if module.config.noise <= 0:
        return None
    held_out = [r for r in records if forbidden_spans(r, r.forbid)]
    if not held_out:
        raise ValueError("no held-out record has a forbidden value: nothing to certify")
    pool = ValuePool(held_out)
    was_training = module.training
    module.eval()
    leaks = pair_leaks(module, held_out[:pairs], pool, source, seed)
    raw = pair_leaks(module, held_out[:64], pool, source, seed, raw=True)
    upper, p0 = upper_bound(leaks, level), blind_guess(held_out)
    ceiling = success_ceiling(upper, p0)
    secrets: dict[str, Any] | None = None
    if known is not None:
        secrets = secret_ceilings(
            module, held_out, source, known, level=level, seed=seed, references=references
        )
        (lead,) = [c for c in secrets["ceilings"] if c["least_guess"] == GUESS]
        p0, ceiling = lead["guess"], lead["upper"]
    module.train(was_training)
    return Certificate(
        float(np.mean(leaks)),
        upper,
        level,
        float(np.median(leaks)),
        float(np.quantile(leaks, 0.99)),
        max(leaks),
        float(np.mean(raw)),
        len(leaks),
        p0,
        ceiling,
        ceiling >= 0.9,
        secrets,
    )
