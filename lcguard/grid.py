"""A guard's mean, rounded to a grid that no content moves, plus an exact draw: what is sent.

In standardised space the grid has steps of sigma / 1024. The mean is rounded to the grid point k,
an integer; the noise is an integer n; ``(k + n) sigma / 1024`` leaves the guard, and all that
follows (a gate's expansion, scales, the pages' dtype) is a function of k + n alone. So whatever is
sent, it could come from any content, with the odds that the distance of the grid points gives and
no others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lcguard.discrete_gaussian import STEPS

LIMIT = 1 << 30
"""Largest grid point of a mean; int32 then holds its draw too."""
EXACT = 1 << 23
"""Below it a grid point and its draw add up exactly in float32."""
SMALLEST = 1e-4
"""Least noise, in standard deviations: the grid reaches 100 of them to each side."""


def single(value: float) -> float:
    """To float32 and back: kernels take no other."""
    return float(np.float32(value))


def steps_per_unit(noise: float) -> float:
    """Steps in one standard deviation of a channel, as every implementation multiplies by it."""
    return single(STEPS / noise)


def step_size(noise: float) -> float:
    """The opposite of ``steps_per_unit``, of which it need not be the exact inverse."""
    return single(noise / STEPS)


def to_grid(mean: Tensor, noise: float) -> Tensor:
    """int32 grid points next to standardised means, ties to even.

    Raises ``ValueError`` for a mean that is not finite.
    """
    if not bool(mean.isfinite().all()):
        raise ValueError("a guard's mean is not finite: it has no place on the grid")
    return _nearest(mean, noise)


def noisy(mean: Tensor, noise: float, draws: Tensor) -> Tensor:
    """Standardised output for integer ``draws`` of ``mean``'s shape, in its dtype.

    NaN where the mean is not finite: who sends it must look, and refuse.
    """
    draws = draws.to(mean.device)
    if mean.numel() and mean.dtype == torch.float32 and draws.dtype == torch.int16:
        steps = (mean * steps_per_unit(noise)).round_()
        low, high = steps.aminmax()
        if bool((low > -EXACT) & (high < EXACT)):  # and none is NaN
            return steps.add_(draws).mul_(step_size(noise))
    points = _nearest(mean, noise) + draws
    return torch.where(mean.isfinite(), points.to(mean.dtype) * step_size(noise), torch.nan)


def _nearest(mean: Tensor, noise: float) -> Tensor:
    steps = (mean * steps_per_unit(noise)).round().nan_to_num()  # a cast of NaN is anything
    return steps.clamp(-LIMIT, LIMIT).to(torch.int32)


def log_likelihood(points: Tensor, means: Tensor, valid: Tensor) -> Tensor:
    """Nats ``[B]`` of what was observed under grid means, but for a constant.

    Args:
        points: observed grid points ``[B, T, L, 2, H * D]``; fractions count by the same law.
        means: integers of that shape, or one for all candidates of the other.
        valid: ``[B, T]``.
    """
    distance = (points.double() - means.double()).square().sum((2, 3, 4)) * valid
    return -distance.sum(1) / (2 * STEPS**2)
