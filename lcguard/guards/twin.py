"""Detect, then recompute: the publishing pass is read by a detector, and what the policy forbids is
replaced in the text before the context is prefilled again.

What was found is gone exactly, as with ``redact``: the segment is a function of a text without it,
so there is no noise, and later tokens keep no trace. What was missed stands in clear; how often
that happens is measured on held-out values and bounded (``lcguard.training.recall``).

The placeholder is the publisher's choice: neutral tokens (``neutral``: one for one, so that the
segment's length tells the value's), a run of fixed length (``fixed_length``), the category's name
in brackets (``typed``), or another value of the category (``surrogate``): the same one wherever the
value stands in the segment, and what the detector missed stands among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lcguard.guards.base import GuardModule, KVShape, Placeholder, Rewrite, register
from lcguard.guards.detector import LatentDetector, bridged, evenly_spaced, peaked
from lcguard.protocols import KVBatch, Mask


@register("twin")
class TwinGuard(GuardModule):
    by_token = True
    passes = True
    needs_twin = True
    finds_secrets = True
    reads_policy = True
    claim = (
        "Exact against every receiver for the values that its detector finds; the card bounds how "
        "many it misses, on text like that it was measured on. Lengths and context remain."
    )

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        layers: tuple[int, ...] = ()
        """Layers whose keys and values are read; empty: six, evenly spaced."""
        width: int = 160
        blocks: int = 2
        reach_tokens: int = 256
        """How far the detector's blocks see, to either side."""
        thresholds: tuple[float, ...] = ()
        """Logit above which a token belongs to a category, one each; empty: -3 for all. Chosen on
        validation records."""
        peak: float = 2.0
        """What one token of a value at least must have over its threshold: a value has a token that
        is sure, and the others may be less so. 0: none."""
        gap_tokens: int = 1
        """Holes of so many tokens inside a found value are closed."""
        placeholder: Placeholder = "neutral"

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c = self.config
        self.layers = tuple(c.layers) or evenly_spaced(shape.layers, 6)
        if not all(0 <= layer < shape.layers for layer in self.layers):
            raise ValueError(f"layers {list(self.layers)} are not all of 0..{shape.layers - 1}")
        if c.placeholder not in get_args(Placeholder):
            raise ValueError(
                f"placeholder {c.placeholder!r} is unknown: use {', '.join(get_args(Placeholder))}"
            )
        self.placeholder = c.placeholder
        thresholds = tuple(c.thresholds) or (-3.0,) * n_categories
        if len(thresholds) != n_categories:
            raise ValueError(f"{len(thresholds)} thresholds for {n_categories} categories")
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64)
        features = len(self.layers) * 2 * shape.kv_heads * shape.head_dim
        self.detector = LatentDetector(features, n_categories, c.width, c.blocks, c.reach_tokens)

    def options(self) -> dict[str, Any]:
        """With the layers and thresholds that the defaults stand for."""
        chosen = {"layers": list(self.layers), "thresholds": self.thresholds.tolist()}
        return super().options() | chosen

    def features(self, kv: KVBatch) -> Tensor:
        """What the detector reads of raw KV: ``[B, T, F]``, standardised."""
        at = torch.tensor(self.layers)
        return self._standard(KVBatch(kv.keys[:, at], kv.values[:, at], kv.valid))

    def _standard(self, kv: KVBatch) -> Tensor:
        """The same of the layers that are read alone."""
        at = torch.tensor(self.layers)
        z = self.channels(KVBatch(kv.keys.float(), kv.values.float(), kv.valid))
        return ((z - self.center[at]) / self.scale[at]).flatten(2)

    def logits(self, kv: KVBatch) -> Tensor:
        """``[B, T, C]``: how surely each token belongs to a value of each category."""
        out: Tensor = self.detector(self.features(kv), kv.valid)
        return out

    @torch.no_grad()
    def marks(self, kv: KVBatch, mask: Mask) -> Tensor:
        """See ``GuardModule.marks``: of the categories that each record's policy forbids."""
        return self.marks_of(self.logits(kv), kv.valid, mask)

    @property
    def marks_layers(self) -> tuple[int, ...]:
        return self.layers

    @torch.no_grad()
    def marks_in(self, tiles: Iterable[KVBatch], mask: Mask) -> Tensor:
        logits = torch.cat(list(self.detector.stream(map(self._standard, tiles))), 1)
        valid = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return self.marks_of(logits, valid, mask)

    def marks_of(
        self, logits: Tensor, valid: Tensor, mask: Mask, peak: float | None = None
    ) -> Tensor:
        """The same from logits ``[B, T, C]``; ``peak`` instead of the guard's own."""
        forbid = mask.forbid.to(logits.device)[:, None]
        over = (logits - self.thresholds.to(logits.device)).masked_fill(~forbid, -torch.inf)
        best = over.max(2)
        hit = (best.values > 0) & valid
        marks = bridged(best.indices.masked_fill(~hit, -1), self.config.gap_tokens)
        return peaked(marks, best.values, self.config.peak if peak is None else peak)

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        # given the twin's KV, which holds nothing of what was found
        return Rewrite(z, torch.zeros(valid.shape, device=z.device))
