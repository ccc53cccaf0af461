"""The discrete Gaussian on the integers, drawn exactly: no logarithm, no cosine, no rounding.

Floating-point noise on a floating-point mean leaves its mark in the last bits (Mironov 2012), and
a receiver who tries candidates reads it. Integers have no last bits: for means k and k' the draws
k + n and k' + n with n ~ exp(-n^2 / 2 S^2) differ by ``(k - k')^2 / 2 S^2`` nats, exactly as for
real numbers (Canonne, Kamath and Steinke, arXiv 2004.00010), and nothing else tells them apart.

Here S = 1024, and the law is a table of integer weights that add up to 2^64, drawn from by the
alias method (Walker; Vose): 64 random bits choose one of 2^15 slots and compare the other 49 with
its threshold. Integer work alone, so that every processor draws the same numbers.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

STEPS = 1024
"""S: the standard deviation in steps of the grid; part of the format, like the table."""
SLOTS = 1 << 15
"""Values -16384 .. 16383: 16 standard deviations, of which 8.6 have a weight."""
ZERO = SLOTS // 2
"""Slot of the value 0."""
BITS = 49
"""Of a threshold, and of the word's part that is compared with it; 15 choose the slot."""
TOTAL = 1 << 64


@cache
def weights() -> tuple[int, ...]:
    """Weight of every slot's value out of 2^64; symmetric, so that the mean is 0 exactly."""
    with localcontext() as context:
        context.prec = 80
        ratio = (Decimal(-1) / (2 * STEPS * STEPS)).exp()
        square, value = ratio * ratio, Decimal(1)
        right: list[Decimal] = []
        for _ in range(1, ZERO):  # exp(-i^2 / 2 S^2), each from the one before
            value *= ratio
            ratio *= square
            right.append(value)
        unit = TOTAL / (1 + 2 * sum(right, Decimal(0)))
        side = [int((w * unit).to_integral_value()) for w in right]
    return 0, *reversed(side), TOTAL - 2 * sum(side), *side


@cache
def table() -> np.ndarray:
    """uint64 ``[2^15]``: a slot's alias in the upper 15 bits, its threshold in the lower 49.

    A slot keeps its own value where the word is below the threshold, else it gives its alias's.
    """
    full, left = TOTAL // SLOTS, list(weights())
    alias, threshold = list(range(SLOTS)), [0] * SLOTS  # a full slot is its own alias
    small = [i for i, w in enumerate(left) if w < full]
    large = [i for i, w in enumerate(left) if w > full]
    while small:
        i, j = small.pop(), large[-1]
        threshold[i], alias[i] = left[i], j
        left[j] -= full - left[i]
        if left[j] <= full:
            large.pop()
            if left[j] < full:
                small.append(j)
    packed = [(a << BITS) | t for a, t in zip(alias, threshold, strict=True)]
    return np.array(packed, dtype=np.uint64)


@cache
def _halves() -> tuple[np.ndarray, np.ndarray]:
    """The table in half its bytes: of each slot the upper 32 bits of its threshold, uint32, and the
    value of its alias, int16."""
    threshold = table() & np.uint64((1 << BITS) - 1)
    alias = (table() >> np.uint64(BITS)).astype(np.int32) - ZERO
    return (threshold >> np.uint64(BITS - 32)).astype(np.uint32), alias.astype(np.int16)


def discrete_gaussian(words: np.ndarray) -> np.ndarray:
    """Random uint32 words ``[..., 2n]`` to int16 draws ``[..., n]``, two neighbours for each."""
    whole = np.ascontiguousarray(words, dtype="<u4").view("<u8")
    slot = (whole >> np.uint64(BITS)).view(np.int64)
    upper, alias = _halves()
    rest = (whole >> np.uint64(BITS - 32)).astype(np.uint32)  # without the bits of the slot
    limit = upper.take(slot)
    drawn = np.where(rest < limit, slot.astype(np.int16) - np.int16(ZERO), alias.take(slot))
    if (equal := rest == limit).any():  # one in 2^32, or a threshold of 0: the other 17 bits decide
        drawn[equal] = _exactly(whole[equal])
    return drawn


def _exactly(whole: np.ndarray) -> np.ndarray:
    """Draws of 64-bit words, by all bits of their thresholds."""
    slot = (whole >> np.uint64(BITS)).view(np.int64)
    entry, left = table()[slot], np.uint64(64 - BITS)
    own = (whole << left) < (entry << left)
    return np.where(own, slot - ZERO, (entry >> np.uint64(BITS)).view(np.int64) - ZERO)
