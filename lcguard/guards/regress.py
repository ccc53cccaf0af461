"""A context network that predicts the twin's KV, with noise.

``z' = (1 - e) z + e W h + sigma n``: a sigmoid ``e`` per entry erases and a linear map of the
context rewrites; trained by regression on the KV of the context without its secrets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lcguard.guards.base import GuardModule, KVShape, Rewrite, register
from lcguard.guards.context import ContextNetwork
from lcguard.protocols import KVBatch, Mask


@register("regress")
class RegressGuard(GuardModule):
    by_token = True
    looks = True
    claim = "Approaches the KV of a context without the secrets; the approximation error leaks."

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        noise: float = 0.3
        width: int = 96
        blocks: int = 2
        reach_tokens: int = 256
        """How far the context network's blocks see, to either side; 0: the whole segment."""

    def __init__(self, shape: KVShape, n_categories: int, config: Config | None = None) -> None:
        super().__init__(shape, n_categories, config)
        c = self.config
        self.context = ContextNetwork(shape, n_categories, c.width, c.blocks, c.reach_tokens)
        self.erase = nn.Linear(c.width, shape.channels)
        self.write = nn.Linear(c.width, shape.channels)
        nn.init.zeros_(self.erase.weight)
        nn.init.constant_(self.erase.bias, -2.0)

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        return self.rewrite_seen(z, valid, mask, self.context(z, valid, mask.vector()))

    def in_tiles(self) -> bool:
        return super().in_tiles() and bool(self.config.reach_tokens)

    def look(self, tiles: Iterable[KVBatch], mask: Mask) -> Iterator[Tensor]:
        return self.context.stream((self.standardise(kv) for kv in tiles), mask.vector())

    def rewrite_seen(self, z: Tensor, valid: Tensor, mask: Mask, seen: Any) -> Rewrite:
        hidden: Tensor = seen
        erase = self.erase(hidden).sigmoid().view_as(z)
        mean = (1 - erase) * z + erase * self.write(hidden).view_as(z)
        return Rewrite(mean, erase.mean((2, 3, 4)) * valid)
