"""The gate for a model that is too large to be trained through: one prefill, noise on traces alone.

What the detector finds is closed: a constant stands there, which knows nothing of the text. Each
token behind it keeps its entry but for the directions in which secrets show at other tokens, the
largest of the counterfactual covariance of each layer's keys and values (after the matching
principle, arXiv 2605.22800). In these a network takes away what it expects a trace to be, and what
is left is covered by noise, in units of how far the traces spread there; further directions may be
projected out:

    z' = z - U (c(z) - s n),    z'' = z' - V V^T z',    n on a grid (``lcguard.grid``).

The first tokens, on which attention rests, are spared, and so is all that stands before the first
value. It is distilled on the twin's KV, the prefill of the context without the values: no gradient
runs through the model. Nothing is certified: outside of U and V a trace passes as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.guards.base import Draws, KVShape, register
from lcguard.guards.single_pass import Found, SinglePassGuard

LEAST_SPREAD = 1e-3
"""Of a direction, in standard deviations of its channels: finer ones would leave the grid."""


@register("trace_gate")
class TraceGateGuard(SinglePassGuard):
    claim = (
        "What its detector finds is withheld where it stands. What later tokens tell of it is "
        "lessened and blurred, and nothing is claimed against a receiver who reads that."
    )

    @dataclass(frozen=True)
    class Config(SinglePassGuard.Config):
        noise: float = 1.0
        """Standard deviation along each direction, in units of how far traces spread in it."""
        projected: int = 0
        """Directions after the first ``rank`` that are projected out."""
        spare_tokens: int = 1
        """First tokens of a segment that are never touched: attention rests on them."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c, width = self.config, shape.kv_heads * shape.head_dim
        if not 0 <= c.projected <= width - c.rank:
            raise ValueError(
                f"projected {c.projected} must be within 0 and the {width - c.rank} directions "
                f"that rank {c.rank} leaves"
            )
        if c.spare_tokens < 0:
            raise ValueError(f"spare_tokens {c.spare_tokens} must be 0 or more")
        some = torch.eye(width)[: c.rank + c.projected]
        self.register_buffer("directions", some.repeat(shape.layers, 2, 1, 1))
        self.register_buffer("spread", torch.ones(shape.layers, 2, c.rank))
        self.register_buffer("constant", torch.zeros(shape.layers, 2, width))

    directions: Tensor
    """U and V ``[L, 2, R + P, W]``, orthonormal, the largest first."""
    spread: Tensor
    """s ``[L, 2, R]``."""
    constant: Tensor
    """``[L, 2, W]``."""

    @torch.no_grad()
    def shape_noise(self, covariance: Tensor, constant: Tensor) -> float:
        """From the traces' second moment ``[L, 2, W, W]``, and what stands for what is found.
        Returns the share of the traces' energy that lies along U, the mean of all layers."""
        values, vectors = torch.linalg.eigh(covariance.double())  # ascending
        values, vectors = values.clamp_min(0).flip(-1), vectors.flip(-1)
        largest = values[..., : self.config.rank]
        self.directions.copy_(vectors[..., : self.directions.shape[2]].mT)
        self.spread.copy_(largest.sqrt().clamp_min(LEAST_SPREAD))
        self.constant.copy_(constant)
        return float((largest.sum(-1) / values.sum(-1).clamp_min(1e-12)).mean())

    def traced(self, z: Tensor, valid: Tensor, hidden: Tensor) -> Tensor:
        """What it expects of the traces along U, in units of their spread: ``[B, T, L, 2, R]``."""
        out: Tensor = self.reader(self.features(z), hidden, valid, self.twin.detector.reach)
        return out

    def along(self, z: Tensor) -> Tensor:
        """``z [B, T, L, 2, W]`` along U, in units of the traces' spread."""
        u = self.directions[:, :, : self.config.rank]
        return torch.einsum("btlkw,lkrw->btlkr", z, u) / self.spread

    def _across(self, coefficients: Tensor) -> Tensor:
        u = self.directions[:, :, : self.config.rank] * self.spread[..., None]
        return torch.einsum("btlkr,lkrw->btlkw", coefficients, u)

    def replaced(self, z: Tensor, valid: Tensor, found: Found) -> Tensor:
        found = self._spared(found)
        without = z - self._across(self.traced(z, valid, found.hidden))
        if self.config.projected:
            v = self.directions[:, :, self.config.rank :]
            inside = torch.einsum("btlkw,lkrw->btlkr", without, v)
            without = without - torch.einsum("btlkr,lkrw->btlkw", inside, v)
        hidden, later = (x[:, :, None, None, None] for x in found)
        return torch.where(hidden, self.constant, torch.where(later, without, z))

    def noised(self, mean: Tensor, found: Found, draws: Draws) -> Tensor:
        """Noise along U at the tokens behind what was found."""
        if not self.config.noise:
            return mean
        inside = self.along(mean)
        # as many places as a token has channels: the draws of a key are laid out by them
        room = F.pad(inside, (0, mean.shape[-1] - inside.shape[-1]))
        moved = self._across(self.add_noise(room, draws)[..., : self.config.rank] - inside)
        later = self._spared(found).later[:, :, None, None, None]
        return torch.where(later, mean + moved, mean)

    def _spared(self, found: Found) -> Found:
        later = found.later.clone()
        later[:, : self.config.spare_tokens] = False
        return found._replace(later=later)
