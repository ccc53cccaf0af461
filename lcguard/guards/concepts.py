"""Streaming statistics of concepts in KV: what linear erasure is made from.

A concept is a set of tokens: all of a category's, or those of its values that are one token. Every
token has at most one label, so a category as a whole is the sum of its concepts. Kept per layer
and K or V are the first two moments of the entries and the sum of the entries of each concept,
in float64 and about the first batch's mean, so that batches add up to what one pass gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4
"""Added to the correlation matrix before it is solved; guardedness holds for any value."""


class Concepts(NamedTuple):
    """What an eraser needs; ``W = H * D`` channels and N concepts."""

    center: Tensor
    """``[L, 2, W]`` mean of every channel."""
    scale: Tensor
    """``[L, 2, W]`` its standard deviation."""
    cross: Tensor
    """``[L, 2, W, N]`` covariance of standardised entries and concept indicators."""
    solved: Tensor
    """``[L, 2, W, N]``: the inverse covariance of the entries times ``cross``."""
    seen: Tensor
    """``[N]`` tokens of each concept."""


class ConceptFitter:
    """Accumulates; never applied. ``update`` as often as there are batches, then ``solve``."""

    def __init__(self, n_concepts: int) -> None:
        self.n_concepts = n_concepts
        self.tokens = 0
        self.seen = torch.zeros(n_concepts, dtype=torch.int64)
        self._shift: Tensor | None = None
        self._sum = self._square = self._by_concept = torch.zeros(0)

    @torch.no_grad()
    def update(self, entries: Tensor, labels: Tensor) -> None:
        """Raw entries ``[N, L, 2, W]`` of tokens with labels ``[N]``; -1: no concept.

        Raises ``ValueError`` for labels outside -1 .. n_concepts - 1 or of another length.
        """
        if labels.shape != entries.shape[:1]:
            raise ValueError(
                f"{tuple(labels.shape)} labels for {len(entries)} tokens: give one a token"
            )
        if not len(labels):
            return
        if int(labels.min()) < -1 or int(labels.max()) >= self.n_concepts:
            raise ValueError(
                f"labels {int(labels.min())} to {int(labels.max())} are not all within -1 and "
                f"{self.n_concepts - 1}"
            )
        x = entries.double().cpu()
        if self._shift is None:
            self._shift = x.mean(0)
            _, layers, two, width = x.shape
            self._sum = torch.zeros_like(self._shift)
            self._square = torch.zeros(layers, two, width, width, dtype=x.dtype)
            self._by_concept = torch.zeros(self.n_concepts, layers, two, width, dtype=x.dtype)
        x = x - self._shift
        labels = labels.cpu()
        self.tokens += len(x)
        self._sum += x.sum(0)
        self._square += torch.einsum("nlkc,nlkd->lkcd", x, x)
        labelled = labels >= 0
        self._by_concept.index_add_(0, labels[labelled], x[labelled])
        self.seen += torch.bincount(labels[labelled], minlength=self.n_concepts)

    @torch.no_grad()
    def solve(self) -> Concepts:
        """Raises ``ValueError`` where nothing, or no labelled token, was seen."""
        if self._shift is None or not int(self.seen.sum()):
            raise ValueError(
                f"{self.tokens} tokens and {int(self.seen.sum())} of them in a concept: erasure "
                "needs labelled tokens"
            )
        mean = self._sum / self.tokens
        covariance = self._square / self.tokens - mean[..., :, None] * mean[..., None, :]
        scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(1e-3)
        covariance = covariance / (scale[..., :, None] * scale[..., None, :])
        share = (self.seen / self.tokens).view(-1, 1, 1, 1)
        cross = (self._by_concept / self.tokens - share * mean) / scale  # [N, L, 2, W]
        cross = cross.permute(1, 2, 3, 0)
        ridge = RIDGE * torch.eye(cross.shape[2], dtype=cross.dtype)
        solved = torch.linalg.solve(covariance + ridge, cross)
        return Concepts(self._shift + mean, scale, cross, solved, self.seen)
