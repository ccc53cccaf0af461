"""A small network that finds what a policy forbids in the latents of the sender's own prefill.

Un-rotated keys and values of a few layers, standardised per channel, go through a linear map and
bidirectional blocks to one logit per token and category. The model has understood the text already
when its KV is there, so little is left to learn: minutes on a CPU, for any model whose KV is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.context import Block


class LatentDetector(nn.Module):
    """Features ``[B, T, F]`` to logits ``[B, T, C]``.

    A block sees ``reach`` tokens to either side: in a long text as in the short ones it learnt on.
    Raises ``ValueError`` for a width that is no multiple of 32, the size of a head.
    """

    def __init__(
        self, features: int, n_categories: int, width: int, blocks: int, reach: int = 256
    ) -> None:
        super().__init__()
        self.reach = reach
        if width % 32:
            raise ValueError(f"width {width} must be a multiple of 32, the size of a head")
        self.read = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.category = nn.Linear(width, n_categories)
        # rare: most tokens belong to no category
        nn.init.constant_(self.category.bias, -4.0)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """``valid [B, T]``."""
        x = self._embedded(features)
        for block in self.blocks:
            x = block(x, valid, self.reach)
        return self.category(self.norm(x))  # type: ignore[no-any-return]

    def stream(self, tiles: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same for one segment that comes in tiles ``[1, t, F]``; they come back later."""
        xs: Iterable[Tensor] = map(self._embedded, tiles)
        for block in self.blocks:
            assert isinstance(block, Block)
            xs = block.stream(xs, self.reach)
        return (self.category(self.norm(x)) for x in xs)

    def _embedded(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.read(F.layer_norm(features, features.shape[-1:]))
        return embedded


def evenly_spaced(layers: int, count: int) -> tuple[int, ...]:
    """``count`` layers of a model, spread from the first sixth to the last one.

    The first layers know tokens, the last ones what is said of them.
    """
    count = min(count, layers)
    first = layers // 6
    if count == 1:
        return (layers - 1,)
    return tuple(round(first + i * (layers - 1 - first) / (count - 1)) for i in range(count))


def bridged(marks: Tensor, gap_tokens: int) -> Tensor:
    """``marks [B, T]``, -1 where nothing is marked, with holes of at most ``gap_tokens`` inside a
    run of one category closed: the dot in a number belongs to it."""
    out = marks.clone()
    for row in out:
        at = (row >= 0).nonzero().flatten().tolist()
        for a, b in itertools.pairwise(at):
            if 1 < b - a <= gap_tokens + 1 and row[a] == row[b]:
                row[a:b] = row[a]
    return out


def peaked(marks: Tensor, over: Tensor, peak: float) -> Tensor:
    """``marks [B, T]`` without the runs of marked tokens, of whatever categories, in which none is
    ``peak`` over its threshold; ``over [B, T]``: what each is over it."""
    out = marks.clone()
    for row, height in zip(out, over.tolist(), strict=True):
        at = (row >= 0).int().tolist()
        for start, end, _ in runs([0 if m else -1 for m in at]):
            if max(height[start:end]) <= peak:
                row[start:end] = -1
    return out


def runs(marks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Token ranges ``(start, end, category)`` of equal marks; -1 is none."""
    out = []
    for category, group in itertools.groupby(range(len(marks)), key=marks.__getitem__):
        at = list(group)
        if category >= 0:
            out.append((at[0], at[-1] + 1, category))
    return out
