"""The directions in which secrets show at other tokens, for noise and for a penalty.

After the matching principle (arXiv 2605.22800): a penalty tr(J S J^T) helps where the range of S
covers what the nuisance, here the secret, does to the input, whatever its shape. S is taken from
counterfactual pairs: the second moment of z(raw) - z(raw') over the tokens outside the values that
were resampled, one matrix a layer and K or V. Values' own tokens are what gates close; a trace of
them on later tokens is small, and of few directions.

    penalty   E || m(z + d) - m(z) ||^2,  d ~ N(0, S) at the tokens outside forbidden values,
    noise     A = (1 + s S)^(-1/2), B = A^-1 to start from: what is sent has the noise
              sigma^2 (1 + s S), more of it along the traces.

The second is a start and no shape that is kept: training moves A and B. The certificate is the same
as ever, for what it bounds stands before B. That S is taken of traces alone is our own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule
from lcguard.records import TokenRecord
from lcguard.source import ModelSource
from lcguard.training.dataset import with_policy
from lcguard.training.twins import ValuePool, forbidden_spans


@torch.no_grad()
def trace_covariance(
    module: GuardModule,
    records: Sequence[TokenRecord],
    pool: ValuePool,
    source: ModelSource,
    seed: int,
    batch: int = 64,
) -> Tensor:
    """S ``[L, 2, W, W]`` in units of each channel's standard deviation, everything resampled.

    Raises ``ValueError`` where no token stands outside a value.
    """
    rng = random.Random(f"traces/{seed}")
    total, count = torch.zeros(()), 0
    for first in range(0, len(records), batch):
        part = with_policy(records[first : first + batch], CATEGORIES)
        pairs = [pool.resample(rng, r, r.forbid) for r in part]
        kv, n = source.prefill([r.ids for r in part] + pairs), len(part)
        z = module.standardise(kv)
        d = (z[:n] - z[n:])[outside(part, kv.valid[:n])]  # [N, L, 2, W]
        total, count = total.to(d) + torch.einsum("nlkc,nlkd->lkcd", d, d), count + len(d)
    if not count:
        raise ValueError("no token stands outside of values: secrets leave no traces to measure")
    return total / count


def outside(records: Sequence[TokenRecord], valid: Tensor) -> Tensor:
    """``[B, T]``: tokens that belong to no forbidden value."""
    mask = valid.clone()
    for i, record in enumerate(records):
        for span in forbidden_spans(record, record.forbid):
            mask[i, span.start : span.end] = False
    return mask


def root(covariance: Tensor, directions: int = 0) -> Tensor:
    """R ``[L, 2, W, W]`` with R R^T = S; with ``directions`` only so many, the largest, are kept.

    Raises ``ValueError`` for more of them than there are channels.
    """
    width = covariance.shape[-1]
    if not 0 <= directions <= width:
        raise ValueError(f"trace_directions={directions} must be within 0 and {width}")
    values, vectors = torch.linalg.eigh(covariance.double())  # ascending
    scale = values.clamp_min(0).sqrt()
    if directions:
        scale[..., : width - directions] = 0
    found: Tensor = (vectors * scale[..., None, :]).to(covariance.dtype)
    return found


def displaced(
    z: Tensor,
    factor: Tensor,
    records: Sequence[TokenRecord],
    valid: Tensor,
    normal: Tensor,
) -> Tensor:
    """``z [B, T, L, 2, W]`` moved by draws of N(0, S) outside forbidden values; ``normal`` are
    standard normal numbers of its shape."""
    moved = torch.einsum("btlkd,lkcd->btlkc", normal.to(z), factor)
    return z + moved * outside(records, valid)[:, :, None, None, None]


def shape_noise(module: GuardModule, factor: Tensor, strength: float) -> None:
    """Starts A and B so that more noise lies along the traces; ``factor`` is R.

    Raises ``ValueError`` for a guard without full maps.
    """
    if getattr(module.config, "maps", None) != "full":
        raise ValueError(
            f"trace_noise={strength} needs a guard with full maps, such as gate, not "
            f"{module.name!r}: set it to 0"
        )
    squeeze, expand = shaped_maps(factor @ factor.mT, strength)
    gate: Any = module
    with torch.no_grad():
        gate.squeeze.copy_(squeeze)
        gate.expand.copy_(expand)


def shaped_maps(covariance: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """A and B ``[L, 2, W, W]``, as ``z A`` and ``z B``."""
    values, vectors = torch.linalg.eigh(covariance.double())
    grown = (1 + strength * values.clamp_min(0)).sqrt()[..., None, :]
    squeeze, expand = ((vectors * x) @ vectors.mT for x in (1 / grown, grown))
    return squeeze.to(covariance.dtype), expand.to(covariance.dtype)
