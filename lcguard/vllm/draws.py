"""One draw of noise for one content: what is published again is what was published before.

Noise is averaged away by whoever gets one record under fresh noise again and again. So a segment
takes over, byte for byte, the rows of an earlier one on its edge for as long as both have the same
tokens from the start (their raw KV is the same: a token reads what is before it). Only rows behind
them are drawn. A conversation that grows is then one draw: its segments tell what the longest of
them tells.

The noise of new rows comes from a key that is an HMAC under the deployment's key of edge, rule,
guard, model, tokens, what they were read on top of, *and the raw KV to the bit*: an engine's sums
differ in their last bits from one batch to the next, and two means next to each other under one
noise would differ just where the mean lies between two points of the grid, to many digits. With
another bit of raw KV, or another way of computing the mean from it, all noise is another.

A publish for several audiences is one draw for all of them, from a key of its own: the set of its
audiences takes the edge's place in it. What is published for one of them as well is another draw.

What is published is named by its *draw* in the manifest: distinct names are draws that add up, and
the proxy's ledger counts them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lcguard.canonical import check_key
from lcguard.handoff.content import Chain, draw_mac
from lcguard.manifest import SegmentError
from lcguard.segment import KVSegment
from lcguard.store import SegmentStore, StoreError

K = TypeVar("K")
V = TypeVar("V")
_BLOCK = 16
"""Between two places of a text at which it is found again."""
_KNOWN = 1 << 16
"""Places that are remembered: a million tokens."""


@dataclass(frozen=True)
class Rows:
    """Guarded KV that is ready to be stored."""

    keys: Tensor
    """``[L, H, T, D]``."""
    values: Tensor
    draw: str = ""
    """Name of the noise; see the module."""
    reused_tokens: int = 0


class Draws:
    """What this engine has drawn. Safe to use from several threads."""

    def __init__(self, key: bytes, store: SegmentStore) -> None:
        self._key, self._store = check_key(key), store
        self._lock = threading.Lock()
        self._places: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        """A text up to some token -> the handles of segments that begin with it: one for each
        audience, of which some may be gone."""
        self._longest: OrderedDict[str, bytes] = OrderedDict()
        """Draw -> all of its longest text."""

    def noise_key(self, chain: Chain, raw: str) -> bytes:
        """32 bytes; ``raw``: what the guard computed its mean from, to the bit, and how."""
        return draw_mac(self._key, "noise", chain[-1].hex(), raw)

    def settle(
        self, chain: Chain, noise_key: bytes, keys: Tensor, values: Tensor, whole: bool = False
    ) -> Rows:
        """Guarded ``keys`` and ``values [L, H, T, D]``, drawn under ``noise_key``, with what was
        drawn before in place of the first rows.

        Args:
            whole: for a guard whose rows are not each one token's: only all of an earlier segment
                is taken over.
        """
        draw = draw_mac(self._key, "draw", noise_key.hex()).hex()
        found = self._earlier(chain, keys, whole)
        if found is None:
            return Rows(keys, values, draw, 0)
        earlier, n = found
        joined = [
            torch.cat((old[:, :, :n], new[:, :, n:]), 2)
            for old, new in ((earlier.keys, keys), (earlier.values, values))
        ]
        manifest = earlier.manifest
        with self._lock:
            grown = n == manifest.n_tokens and self._longest.get(manifest.draw) == chain[n - 1]
            if grown:  # by this one alone, of several that are stored at the same time
                _put(self._longest, manifest.draw, chain[-1])
        same = n == len(chain) or grown
        return Rows(joined[0], joined[1], manifest.draw if same else draw, n)

    def stored(self, chain: Chain, rows: Rows, handles: Sequence[str]) -> None:
        """Remembers a segment that the store has taken, under a handle for each audience."""
        with self._lock:
            for n in {*range(_BLOCK, len(chain) + 1, _BLOCK), len(chain)}:
                _put(self._places, chain[n - 1], tuple(handles))
            if rows.reused_tokens < len(chain):
                _put(self._longest, rows.draw, chain[-1])

    def _earlier(self, chain: Chain, like: Tensor, whole: bool) -> tuple[KVSegment, int] | None:
        """The segment with the longest common start, and its tokens."""
        gone: set[str] = set()
        for n in range(len(chain), 0, -1):
            with self._lock:
                handles = self._places.get(chain[n - 1], ())
            for handle in handles:
                segment = None if handle in gone else self._load(handle)
                if segment is None:  # expired, revoked or out of reach: another audience's may do
                    gone.add(handle)
                    continue
                total = segment.manifest.n_tokens
                if segment.keys.dtype == like.dtype and not (
                    whole and not n == total == len(chain)
                ):
                    return segment, n
        return None

    def _load(self, handle: str) -> KVSegment | None:
        try:
            return self._store.load(handle, self._key)
        except (SegmentError, StoreError):
            return None


def _put(table: OrderedDict[K, V], key: K, value: V) -> None:
    """Forgets what was not put for the longest time."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > _KNOWN:
        table.popitem(last=False)
