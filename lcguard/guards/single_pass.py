"""What guards share that rewrite the sender's one prefill: a detector, and what stands behind.

``twin`` reads the context a second time; these do not: what the detector marks is overwritten where
it stands, and the tokens behind it keep entries that were made while it stood there. What each of
them does about those is its own, and so is what it may claim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.base import Draws, GuardModule, KVShape, Rewrite
from lcguard.guards.context import Block
from lcguard.guards.twin import TwinGuard
from lcguard.protocols import KVBatch, Mask


class Found(NamedTuple):
    """What is hidden of B segments, and what stands behind it."""

    hidden: Tensor
    """``[B, T]`` bool: tokens of what was found."""
    later: Tensor
    """``[B, T]`` bool: other tokens behind the first of them. Attention is causal: those before it
    know nothing of it."""

    @classmethod
    def of(cls, hidden: Tensor, valid: Tensor) -> Found:
        return cls(hidden, (hidden.cumsum(1) > 0) & ~hidden & valid)


class SpanReader(nn.Module):
    """Features ``[B, T, F]`` and which tokens are hidden ``[B, T]`` to coefficients
    ``[B, T, L, 2, R]``; all zero at first."""

    def __init__(self, features: int, layers: int, rank: int, width: int, blocks: int) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"width {width} must be a multiple of 32, the size of a head")
        self.out = (layers, 2, rank)
        self.read = nn.Linear(features, width)
        self.mark = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, layers * 2 * rank)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, features: Tensor, hidden: Tensor, valid: Tensor, reach: int) -> Tensor:
        x = self.read(F.layer_norm(features, features.shape[-1:])) + self.mark(hidden.long())
        for block in self.blocks:
            x = block(x, valid, reach)
        out: Tensor = self.write(self.norm(x)).unflatten(-1, self.out)
        return out


class SinglePassGuard(GuardModule):
    """Base class; subclasses define ``replaced``, and ``noised`` where they add noise."""

    reads_policy = True

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        detector: dict[str, Any] = field(default_factory=dict)
        """Options of guard ``twin``, whose detector it is."""
        width: int = 128
        blocks: int = 2
        """Of the network that reads what is to be written."""
        rank: int = 16
        """R: directions of each layer's keys and values in which it writes."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c = self.config
        self.twin = TwinGuard.build(shape, n_categories, dict(c.detector))
        width = shape.kv_heads * shape.head_dim
        if not 0 < c.rank <= width:
            raise ValueError(f"rank {c.rank} must be within 1 and the {width} channels of a layer")
        features = len(self.twin.layers) * 2 * width
        self.reader = SpanReader(features, shape.layers, c.rank, c.width, c.blocks)

    def options(self) -> dict[str, Any]:
        return super().options() | {"detector": self.twin.options()}

    @torch.no_grad()
    def start_from(self, twin: TwinGuard) -> None:
        """Takes over a fitted detector, which was made with the same options, and its statistics
        of the channels."""
        self.twin.load_state_dict(twin.state_dict())
        self.center.copy_(twin.center)
        self.scale.copy_(twin.scale)

    def features(self, z: Tensor) -> Tensor:
        """What detector and reader see of standardised KV: ``[B, T, F]``."""
        return z[:, :, torch.tensor(self.twin.layers)].flatten(2)

    @torch.no_grad()
    def found(self, z: Tensor, valid: Tensor, mask: Mask) -> Found:
        """What the detector finds of what each record's policy forbids."""
        logits = self.twin.detector(self.features(z), valid)
        return Found.of(self.twin.marks_of(logits, valid, mask) >= 0, valid)

    def replaced(self, z: Tensor, valid: Tensor, found: Found) -> Tensor:
        """Standardised KV ``[B, T, L, 2, W]`` without what was found, before noise."""
        raise NotImplementedError(f"guard {self.name!r} replaces nothing")

    def noised(self, mean: Tensor, found: Found, draws: Draws) -> Tensor:
        """What is sent for ``mean``."""
        return mean

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        return self._rewritten(z, valid, self.found(z, valid, mask))

    def _rewritten(self, z: Tensor, valid: Tensor, found: Found) -> Rewrite:
        mean = self.replaced(z, valid, found) if bool(found.hidden.any()) else z
        return Rewrite(mean, found.hidden.to(z.dtype))

    def forward(self, kv: KVBatch, mask: Mask, generator: Draws = None) -> tuple[KVBatch, Rewrite]:
        """Guarded KV and what it was made of. Entries before the first of what was found are those
        of ``kv``, to the last bit."""
        raw = self.standardise(kv)
        found = self.found(raw, kv.valid, mask)
        rewrite = self._rewritten(raw, kv.valid, found)
        sent = self.restore(self.noised(rewrite.mean, found, generator), kv)
        changed = (found.hidden | found.later)[:, None, None, :, None]
        live = kv.valid[:, None, None, :, None]
        out = KVBatch(
            torch.where(changed, sent.keys, kv.keys * live),
            torch.where(changed, sent.values, kv.values * live),
            kv.valid,
        )
        return out, rewrite

    def _own_noise(self) -> float:
        raise ValueError(
            f"guard {self.name!r} adds noise in some directions alone: it has no grid that a "
            "certificate or an attack by likelihood could use"
        )
