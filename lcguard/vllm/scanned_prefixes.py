"""What a scan computed before its first mark is not computed a second time.

The pass in which a guard looks for secrets and the one that publishes read the same tokens up to
the first that is marked, and attention reads nothing behind a token: their keys and values are the
same. The worker keeps a copy of those, never of a marked token or of one behind it, and writes it
into the pages of the second pass. It is named by the engine's signed word on the scan and by what
was consumed before it: it is for this prompt under this rule behind these segments alone, and for
one request. The scheduler says when a copy goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from lcguard.manifest import Manifest, SegmentError
from lcguard.vllm.pages import gather_layers, write_layers
from lcguard.vllm.rank_pages import RankPages

LEAST_TOKENS = 12
"""Fewer are computed sooner than they are brought."""
KEPT_BYTES = 256 << 20
"""Of all copies in a worker; a longer prefix is kept as far as there is room."""
KEPT_S = 30.0
"""A copy that no second pass has asked for by then goes with the engine's next step."""


class PrefixCopies:
    """The worker's half. On one rank alone: others do not know what was marked."""

    def __init__(self, pages: RankPages) -> None:
        self._pages = pages
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        """Handle of a scan to rotated keys and values ``[L, H, T, D]``."""

    def keep(self, handle: str, blocks: list[int], start: int, end: int) -> int:
        """Copies tokens ``start .. end`` of a scan's request: how many of them, from the first."""
        pages, layers = self._pages, self._pages.layers
        if pages.world != 1:
            return 0
        used = sum(x.nbytes for both in self._copies.values() for x in both)
        each = sum(2 * x.heads * x.dim * x.pages.element_size() for x in layers)
        n = min(end - start, (KEPT_BYTES - used) // each)
        if n < LEAST_TOKENS:
            return 0
        keys, values = gather_layers(layers, pages.slots(blocks, start, start + n))
        self._copies[handle] = keys.cpu(), values.cpu()
        return n

    def place(self, handle: str, blocks: list[int], first: int, start: int, end: int) -> None:
        """Writes tokens ``start .. end`` of a request into its pages, of a copy whose first token
        is its token ``first``. Raises ``SegmentError`` where it is gone."""
        if handle not in self._copies:
            raise SegmentError(f"what scan {handle[:6]}... computed is gone")
        pages = self._pages
        own = slice(start - first, end - first)
        keys, values = (x[:, :, own].to(pages.device) for x in self._copies[handle])
        write_layers(pages.layers, pages.slots(blocks, start, end), keys, values)

    def drop(self, handles: list[str]) -> None:
        for handle in handles:
            self._copies.pop(handle, None)


class Prefix(NamedTuple):
    """A copy that a worker keeps."""

    handle: str
    """Of the scan."""
    n_tokens: int


class ScannedPrefixes:
    """The scheduler's half."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._offered: dict[tuple[str, ...], tuple[Prefix, float]] = {}
        """The engine's word on a scan, and handles of what stood before it, to what was kept of it,
        and until when."""
        self._released: list[str] = []

    def offer(self, scan: str, consumed: Sequence[Manifest], handle: str, n_tokens: int) -> None:
        """The next publish with this word behind the same segments may use what the worker keeps:
        behind others these tokens would tell of segments that their lineage knows nothing of."""
        if (older := self.claim(scan, consumed)) is not None:  # the same twice within a second
            self.release(older.handle)
        self._offered[_name(scan, consumed)] = Prefix(handle, n_tokens), self._clock() + KEPT_S

    def claim(self, scan: str, consumed: Sequence[Manifest]) -> Prefix | None:
        """Once; to be released when its request ends."""
        found = self._offered.pop(_name(scan, consumed), None)
        return None if found is None else found[0]

    def release(self, handle: str) -> None:
        self._released.append(handle)

    def to_drop(self) -> list[str]:
        """Copies that nobody will ask for any more, each told once."""
        now = self._clock()
        late = [name for name, (_, until) in self._offered.items() if until <= now]
        out = self._released + [self._offered.pop(name)[0].handle for name in late]
        self._released = []
        return out


def _name(scan: str, consumed: Sequence[Manifest]) -> tuple[str, ...]:
    return (scan, *(manifest.handle for manifest in consumed))
