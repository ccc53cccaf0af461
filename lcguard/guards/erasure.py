"""Linear concept erasure in closed form (LEACE, arXiv 2306.03819), one eraser a policy.

Per layer and K or V, with z the standardised entry of a token (mean 0) and y the indicators of the
concepts that the policy forbids,

    z' = z - C G^+ (S^-1 C)^T z,    C = cov(z, y),  S = cov(z),  G = C^T S^-1 C:

the smallest change, in S's own metric, after which ``cov(z', y) = 0``, so that no linear reader
of a token, of all layers together either, does better on the forbidden concepts than one that sees
nothing, over tokens like the fitted ones. C and S^-1 C are stored for every concept, so any subset
of categories is erased jointly, not one after the other. Anything non-linear stays readable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.guards.concepts import ConceptFitter, Concepts
from lcguard.protocols import KVBatch, Mask


@register("erasure")
class ErasureGuard(GuardModule):
    by_token = True
    trained = False
    reads_policy = True
    claim = (
        "No linear probe of a token's entry recognises a forbidden category's concepts, on records "
        "like those it was fitted on; nothing is claimed against any other reader."
    )

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        values: int = 0
        """Concepts a category has beside its tokens at large: one for each of so many of its most
        frequent tokens."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        if self.config.values < 0:
            raise ValueError(f"values {self.config.values} must be 0 or more tokens a category")
        size = shape.layers, 2, shape.kv_heads * shape.head_dim, self.n_concepts
        self.register_buffer("cross", torch.zeros(size))
        self.register_buffer("solved", torch.zeros(size))
        self.register_buffer("seen", torch.zeros(self.n_concepts, dtype=torch.int64))

    cross: Tensor
    solved: Tensor
    seen: Tensor

    @property
    def n_concepts(self) -> int:
        """Concept ``c * (1 + values) + i``: other tokens of category c, then its i-th token."""
        return self.n_categories * (1 + int(self.config.values))

    @property
    def fitted(self) -> bool:
        return bool(self.seen.any())

    def fit_statistics(self, kv: KVBatch) -> None:
        """Those of the concepts stay, once there are any: an eraser is exact about its own."""
        if not self.fitted:
            super().fit_statistics(kv)

    def fit_concepts(self, kv: KVBatch, labels: Tensor) -> None:
        """From raw KV and concepts ``[B, T]`` (-1: none) at once."""
        fitter = ConceptFitter(self.n_concepts)
        fitter.update(self.channels(kv)[kv.valid], labels.to(kv.valid.device)[kv.valid])
        self.load_concepts(fitter.solve())

    @torch.no_grad()
    def load_concepts(self, concepts: Concepts) -> None:
        """Takes over what a fitter found."""
        for name, tensor in concepts._asdict().items():
            getattr(self, name).copy_(tensor)

    @torch.no_grad()
    def eraser(self, forbid: Tensor) -> Tensor:
        """``A [L, 2, W, W]`` with ``z' = z - A z`` for one policy ``[C]``; its trace is its rank.

        Raises as ``factors``.
        """
        left, right = self.factors(forbid)
        out: Tensor = left @ right
        return out

    @torch.no_grad()
    def factors(self, forbid: Tensor) -> tuple[Tensor, Tensor]:
        """``[L, 2, W, N]`` and ``[L, 2, N, W]``, float64, of which ``eraser`` is the product.

        Raises ``ValueError`` where a forbidden category was never seen: nothing would be erased.
        """
        seen = self.seen.view(self.n_categories, -1)
        for c in forbid.nonzero().flatten().tolist():
            if not int(seen[c].sum()):
                name = CATEGORIES[c] if self.n_categories == len(CATEGORIES) else str(c)
                raise ValueError(
                    f"guard {self.name!r} was fitted on no token of category {name!r}, which the "
                    "policy forbids: fit it on records that have some"
                )
        columns = forbid.to(seen.device).repeat_interleave(seen.shape[1]) & (self.seen > 0)
        cross, solved = (t[..., columns].double() for t in (self.cross, self.solved))
        # rare concepts have small covariances: on one scale, or the cut-off would keep them
        size = (cross * solved).sum(2, keepdim=True)
        norm = torch.where(size > 1e-12, size.clamp_min(1e-12).rsqrt(), 0.0)
        cross, solved = cross * norm, solved * norm
        inverse = torch.linalg.pinv(solved.mT @ cross, rtol=1e-7)
        return cross @ inverse, solved.mT

    def rewrite_seen(self, z: Tensor, valid: Tensor, mask: Mask, seen: Any) -> Rewrite:
        """By factors: the eraser of a large model has as many numbers as a long segment."""
        if not self.fitted or not bool(mask.forbid.any()):
            return self.rewrite(z, valid, mask)
        left, right = (x.to(z.dtype) for x in self.factors(mask.forbid[0]))
        share = (left * right.mT).sum((2, 3)).mean().clamp(0, 1) / left.shape[2]
        inner = torch.einsum("btlkc,lknc->btlkn", z, right)
        mean = z - torch.einsum("btlkn,lkdn->btlkd", inner, left)
        return Rewrite(mean, share * valid)

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        if not self.fitted:
            raise ValueError(
                f"guard {self.name!r} is not fitted: call fit_concepts, or load a fitted one"
            )
        withheld = torch.zeros(valid.shape, device=z.device)
        policies, which = torch.unique(mask.forbid, dim=0, return_inverse=True)
        if not bool(policies.any()):
            return Rewrite(z, withheld)
        mean = torch.empty_like(z)
        for i, policy in enumerate(policies):
            rows = (which == i).to(z.device)
            if not bool(policy.any()):
                mean[rows] = z[rows]
                continue
            eraser = self.eraser(policy)
            share = eraser.diagonal(dim1=-2, dim2=-1).mean().clamp(0, 1)  # of all dimensions
            mean[rows] = z[rows] - torch.einsum("btlkc,lkdc->btlkd", z[rows], eraser.to(z.dtype))
            withheld[rows] = share.to(withheld.dtype)
        return Rewrite(mean, withheld * valid)
