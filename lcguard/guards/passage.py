"""One segment's way through a guard, some tokens at a time: memory for a tile, not for the segment.

A guard that rewrites ``by_token`` sees *tiles* of its own size, which follow from the segment's
length and the guard alone, first all of them once (``look``), then each again when it is asked for
(``block``). Whoever asks for other ranges gets parts of the same tiles: what is sent, and so its
digest and its draw, does not depend on how much is asked for at a time. A sum in another order
would differ in its last bits, and two means next to each other under one noise show where they lie.

Any other guard has one tile, the segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lcguard.guards.base import GuardError, GuardModule
from lcguard.protocols import KVBatch, Mask


class Tokens(Protocol):
    """Raw KV of one segment, of which any range can be read, again and again."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(L, H, D)``."""

    def copy(self, keys: Tensor, values: Tensor) -> None:
        """Writes all of it, position-free, into ``[L, H, T, D]``."""

    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        """``[1, L, H, end - start, D]``, position-free, of these layers; None: of all."""


class HeldTokens:
    """Raw KV of one segment that is in memory, ``[1, L, H, T, D]`` without padding."""

    def __init__(self, kv: KVBatch) -> None:
        if len(kv) != 1 or not bool(kv.valid.all()):
            raise ValueError(
                f"{len(kv)} segments of {kv.valid.sum(1).tolist()} tokens in "
                f"{kv.valid.shape[1]} places: give one segment, without padding"
            )
        self._kv = kv

    @property
    def n_tokens(self) -> int:
        return self._kv.valid.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        _, layers, heads, _, dim = self._kv.keys.shape
        return layers, heads, dim

    def copy(self, keys: Tensor, values: Tensor) -> None:
        keys.copy_(self._kv.keys[0])
        values.copy_(self._kv.values[0])

    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        kv, of = self._kv, slice(None) if layers is None else list(layers)
        keys, values = (x[:, of, :, start:end].float() for x in (kv.keys, kv.values))
        return KVBatch(keys, values, kv.valid[:, start:end])


class StartedTokens:
    """What a guard that needs a twin rewrites, of raw KV and the twin's."""

    def __init__(self, module: GuardModule, tokens: Tokens, twin: Tokens) -> None:
        self._module, self._tokens, self._twin = module, tokens, twin

    @property
    def n_tokens(self) -> int:
        return self._twin.n_tokens

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._tokens.shape

    def copy(self, keys: Tensor, values: Tensor) -> None:
        self._twin.copy(keys, values)

    def read(self, start: int, end: int, layers: Sequence[int] | None = None) -> KVBatch:
        kv = self._tokens.read(start, end, layers)
        twin = kv if self._twin is self._tokens else self._twin.read(start, end, layers)
        try:
            return self._module.start(kv, twin)
        except ValueError as error:
            raise GuardError(str(error)) from error


class Passage:
    """See the module; made by ``FrozenGuard.passage``."""

    def __init__(self, module: GuardModule, tokens: Tokens, mask: Mask, dtype: torch.dtype) -> None:
        self._module, self._tokens, self._mask, self._dtype = module, tokens, mask, dtype
        n, size = tokens.n_tokens, module.tile_tokens(tokens.n_tokens)
        self.tiles = _ranges(n, size)
        """Token ranges that are rewritten at a time: the cheapest to ask for."""
        self.seen: list[Any] | None = None
        """What ``look`` said of each tile."""
        self._last: tuple[int, bytes, KVBatch] | None = None

    @torch.inference_mode()
    def look(self) -> None:
        """Reads the segment once, for what a tile's rewriting needs of the others: not where the
        guard needs nothing, as reading is what a publish through such a guard costs."""
        if type(self._module).look is GuardModule.look:
            self.seen = [None] * len(self.tiles)
            return
        tiles = (self._tokens.read(start, end) for start, end in self.tiles)
        self.seen = list(self._module.look(tiles, self._mask))

    @torch.inference_mode()
    def marks(self) -> Tensor | None:
        """See ``GuardModule.marks``."""
        layers, n = self._module.marks_layers, self._tokens.n_tokens
        tiles = (
            self._tokens.read(start, end, layers)
            for start, end in _ranges(n, self._module.tile_tokens(n, layers))
        )
        return self._module.marks_in(tiles, self._mask)

    @torch.inference_mode()
    def block(self, key: bytes, start: int, end: int) -> KVBatch:
        """Guarded KV ``[1, L, H, end - start, D]``, with the noise of ``key``.

        Raises ``ValueError`` for a range outside the segment, and ``GuardError`` for output that is
        not finite.
        """
        if not 0 <= start < end <= self._tokens.n_tokens:
            raise ValueError(f"tokens {start}..{end} are not of {self._tokens.n_tokens}")
        if self.seen is None:
            self.look()
        parts = []
        for index, (first, last) in enumerate(self.tiles):
            if first < end and start < last:
                kv = self._tile(key, index)
                own = slice(max(start, first) - first, min(end, last) - first)
                parts.append([x[:, :, :, own] for x in (kv.keys, kv.values)])
        keys, values = (
            xs[0] if len(xs) == 1 else torch.cat(xs, 3) for xs in zip(*parts, strict=True)
        )
        valid = torch.ones(1, end - start, dtype=torch.bool, device=keys.device)
        return KVBatch(keys, values, valid)

    def blocks(self, key: bytes, block_tokens: int) -> Iterator[KVBatch]:
        """The whole segment, so many tokens at a time."""
        for start, end in _ranges(self._tokens.n_tokens, block_tokens):
            yield self.block(key, start, end)

    def fill(self, key: bytes, keys: Tensor, values: Tensor) -> None:
        """Writes the whole segment into ``keys`` and ``values [L, H, T, D]``, of any device."""
        if self._module.sends_as_is:
            self._tokens.copy(keys, values)
            self._check_finite(keys, values)
            return
        for start, end in self.tiles:
            kv = self.block(key, start, end)
            keys[:, :, start:end], values[:, :, start:end] = kv.keys[0], kv.values[0]

    def _tile(self, key: bytes, index: int) -> KVBatch:
        if self._last is not None and self._last[:2] == (index, key):
            return self._last[2]
        assert self.seen is not None
        self._last = None  # before there is another
        first, last = self.tiles[index]
        # the tile is the callee's alone, to be let go of
        out = self._module.rewrite_tile(
            self._tokens.read(first, last), self._mask, key, first, self.seen[index]
        ).to(self._dtype)
        self._check_finite(out.keys, out.values)
        self._last = index, key, out
        return out

    def _check_finite(self, *sent: Tensor) -> None:
        if not all(map(_finite, sent)):
            raise GuardError(
                f"guard {self._module.name!r} gave values that are not finite; withheld"
            )


def _ranges(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _finite(x: Tensor) -> bool:
    low, high = x.aminmax()  # either is NaN where anything is
    return bool(torch.isfinite(low) & torch.isfinite(high))
