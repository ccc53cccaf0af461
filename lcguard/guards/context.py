"""The small bidirectional network with which a guard reads a segment.

Un-rotated KV holds no positions, so its attention rotates by token index: a value that stands
before its label ("... was entered as SSN") is recognised from what follows it. A token sees
``reach`` tokens to either side, so that the work grows with the segment and not with its square,
and a long text is read as the short ones that it was trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcguard.guards.base import KVShape

QUERIES = 128
"""Tokens that attend at a time: what they see is a band, of which the corners are wasted."""


def rotate_half(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, heads, T, D]`` at ``positions [T]``, base 1,000."""
    half = x.shape[-1] // 2
    rate = 1000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * rate
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def banded(
    q: Tensor, k: Tensor, v: Tensor, reach: int, first: int = 0, valid: Tensor | None = None
) -> Tensor:
    """Attention of each query to the keys at most ``reach`` places away: ``[B, heads, T, D]``.

    Args:
        q: ``[B, heads, T, D]``; query 0 stands where key ``first`` does.
        k, v: ``[B, heads, S, D]``.
        valid: ``[B, S]``; None where all keys are.
    """
    out = []
    for start in range(first, first + q.shape[2], QUERIES):
        end = min(start + QUERIES, first + q.shape[2])
        low, high = max(0, start - reach), min(k.shape[2], end + reach)
        at = slice(low - start + reach, high - start + reach)
        band = _band(reach, q.device, q.dtype)[: end - start, at]
        if valid is not None:
            hidden = ~valid[:, None, None, low:high]
            rows = torch.arange(start, end, device=q.device)[:, None]
            # padding sees itself, or its softmax would be empty and its gradient not a number
            hidden = hidden & (rows != torch.arange(low, high, device=q.device))
            band = band.masked_fill(hidden, -torch.inf)
        queries = q[:, :, start - first : end - first]
        keys, values = k[:, :, low:high], v[:, :, low:high]
        out.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=band))
    return torch.cat(out, 2)


@lru_cache(maxsize=8)
def _band(reach: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of ``QUERIES`` queries and the keys from ``reach`` before the
    first of them on: 0 within reach, else minus infinity."""
    with torch.inference_mode(False):  # whoever asks first: a later one may train
        away = torch.arange(QUERIES)[:, None] - torch.arange(-reach, QUERIES + reach)
        band = torch.zeros(away.shape, dtype=dtype)
        return band.masked_fill_(away.abs() > reach, -torch.inf).to(device)


class _Tile(NamedTuple):
    """Some tokens on their way through a block."""

    start: int
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def end(self) -> int:
        return self.start + self.x.shape[1]


class Block(nn.Module):
    """Pre-norm self-attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, valid: Tensor, reach: int = 0) -> Tensor:
        """``x [B, T, width]``; ``valid``: ``[B, T]``, or ``[B, T, T]`` which tokens each one sees.

        ``reach``: how far a token sees, 0 for everything; with ``valid [B, T]`` alone.
        """
        q, k, v = self._projected(x, 0)
        if reach and x.shape[1] > reach + 1:
            return self._finished(x, banded(q, k, v, reach, valid=valid))
        if valid.ndim == 2:
            valid = valid[:, None].expand(-1, x.shape[1], -1)
        return self._finished(x, F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None]))

    def stream(self, tiles: Iterable[Tensor], reach: int) -> Iterator[Tensor]:
        """The same for one segment that comes in tiles ``[1, t, width]``, each given back when
        ``reach`` tokens behind it have come: memory for what one tile sees."""
        held: deque[_Tile] = deque()
        waiting = end = 0
        for x in tiles:
            held.append(_Tile(end, x, *self._projected(x, end)))
            end += x.shape[1]
            while waiting < len(held) and held[waiting].end + reach <= end:
                yield self._attended(held, waiting, reach)
                waiting = _forget(held, waiting, reach)
        while waiting < len(held):
            yield self._attended(held, waiting, reach)
            waiting = _forget(held, waiting, reach)

    def whole(self, x: Tensor) -> Tensor:
        """A segment ``[1, T, width]`` of which every token sees all."""
        seen: Tensor = self(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        return seen

    def _attended(self, held: deque[_Tile], index: int, reach: int) -> Tensor:
        tile = held[index]
        seen = [t for t in held if t.start < tile.end + reach]
        k, v = (torch.cat(x, 2) for x in ([t.k for t in seen], [t.v for t in seen]))
        return self._finished(tile.x, banded(tile.q, k, v, reach, tile.start - seen[0].start))

    def _projected(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by where they stand, and values, ``[B, heads, T, D]``."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(first, first + x.shape[1], device=x.device)
        q, k = rotate_half(qkv[:2], positions)
        return q, k, qkv[2]

    def _finished(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _forget(held: deque[_Tile], done: int, reach: int) -> int:
    """Drops what nobody behind tile ``done`` sees; the index of the next one."""
    needed = held[done].end - reach
    while done >= 0 and held[0].end <= needed:
        held.popleft()
        done -= 1
    return done + 1


class ContextNetwork(nn.Module):
    """``z [B, T, L, 2, H * D]`` and a policy vector ``[B, 2C]`` to hidden states ``[B, T, d]``.

    ``n_categories`` 0 makes a network that does not read the policy; ``reach_tokens`` 0 one whose
    tokens see the whole segment.
    """

    def __init__(
        self, shape: KVShape, n_categories: int, width: int, blocks: int, reach_tokens: int = 0
    ) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"width {width} must be a multiple of 32, the size of a head")
        if reach_tokens < 0:
            raise ValueError(f"reach_tokens {reach_tokens} must be 0 (all of them) or more")
        self.reach = reach_tokens
        self.read = nn.Linear(shape.channels, width)
        self.policy = nn.Linear(2 * n_categories, width) if n_categories else None
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, valid: Tensor, policy: Tensor | None = None) -> Tensor:
        x = self._embedded(z, policy)
        for block in self.blocks:
            x = block(x, valid, self.reach)
        return self.norm(x)  # type: ignore[no-any-return]

    def stream(self, tiles: Iterable[Tensor], policy: Tensor | None = None) -> Iterator[Tensor]:
        """The same for one segment in tiles ``[1, t, L, 2, H * D]``, without padding; they come
        back some tiles later. Where tokens see everything, one tile has to hold the segment."""
        xs: Iterable[Tensor] = (self._embedded(z, policy) for z in tiles)
        for block in self.blocks:
            assert isinstance(block, Block)
            xs = block.stream(xs, self.reach) if self.reach else map(block.whole, xs)
        yield from map(self.norm, xs)

    def _embedded(self, z: Tensor, policy: Tensor | None) -> Tensor:
        flat = z.flatten(2)
        x: Tensor = self.read(F.layer_norm(flat, flat.shape[-1:]))
        if self.policy is not None and policy is not None:
            x = x + self.policy(policy.to(z.device))[:, None]
        return x
