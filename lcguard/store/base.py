"""What every store keeps to: whole, immutable, signed segments under their own handle.

    store = open_store("file:///var/lib/lcguard")
    store.put(segment.sign(key))
    received = store.load(handle, key)

A store holds no key, so it cannot tell a forged segment from a signed one when it takes it: the
reader does, in ``load``. The handle is in the signed manifest, so that whoever can write to the
store cannot pass one segment off as another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from lcguard.manifest import Manifest, SegmentError

if TYPE_CHECKING:
    from lcguard.segment import KVSegment

HANDLE = re.compile(r"[A-Za-z0-9_-]{16,128}")
GRACE_S = 600.0
"""For how long unfinished writing counts as going on, and a retired handle stays taken."""
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class StoreError(RuntimeError):
    """A store that is full, gone or misconfigured. One line that names the value and the fix."""


class SegmentNotFound(SegmentError):
    """No segment under this handle: never put, deleted or expired, which a reader cannot tell."""

    def __init__(self, handle: str) -> None:
        super().__init__(f"{handle}: no such segment: never put, deleted or expired")


class SegmentStore(Protocol):
    """Every method but ``close`` raises ``StoreError`` where the store cannot be reached."""

    shared: bool
    """Whether another process sees the same segments."""

    def put(self, segment: KVSegment) -> None:
        """Commits a signed segment under ``segment.manifest.handle``: all of it or nothing.

        Handles are used once: even an expired one stays taken until it is swept.

        Raises:
            SegmentError: a taken, malformed or missing handle, no signature, an expiry that has
                passed, or tensors other than the digests say.
            StoreError: no room. Older segments may have gone to make some.
        """

    def manifest(self, handle: str) -> Manifest:
        """The manifest, at no cost of tensor bytes; not yet verified against a key.

        Raises:
            SegmentNotFound: missing or expired.
            SegmentError: a malformed handle or manifest, or the manifest of another handle.
        """

    def load(self, handle: str, key: bytes) -> KVSegment:
        """The segment on the CPU, in memory of its own, verified after it was copied there.

        Raises:
            SegmentNotFound: missing, expired, or deleted while it was read.
            SegmentError: another key, or anything altered.
        """

    def delete(self, handle: str) -> bool:
        """Whether there was such a segment. Of several callers at once, one is told yes."""

    def retire(self, handle: str) -> None:
        """Deletes what there is, and lets nothing be put under this handle for some minutes: for a
        writer that cannot be told to stop. Readers find no segment."""

    def handles(self) -> list[str]:
        """Of the readable segments that have not expired, sorted."""

    def sweep(self) -> int:
        """Removes what has expired, what crashed writers left, and the oldest above the bound.

        Returns how many went. To be called now and then; any number of processes may.
        """

    def check(self) -> None:
        """Writes a little, reads it and deletes it: raises ``StoreError`` where that fails, as then
        nothing could be put, found or deleted."""

    def time_s(self) -> float | None:
        """Unix time as the store's own machine has it; None where that is this machine."""

    def close(self) -> None:
        """Lets go of connections and memory; nothing may be called afterwards."""


def check_handle(handle: str) -> str:
    """``handle`` if it is safe in a path and in a key. Raises ``SegmentError`` otherwise."""
    if not HANDLE.fullmatch(handle):
        raise SegmentError(
            f"handle {handle[:40]!r} is not 16 to 128 letters, digits, '-' or '_': "
            "make one with secrets.token_urlsafe()"
        )
    return handle


def check_new(segment: KVSegment, now_s: float, max_bytes: int | None) -> Manifest:
    """The manifest of a segment that a store may take; raises as ``SegmentStore.put``."""
    manifest = segment.manifest
    check_handle(manifest.handle)
    if not manifest.hmac:
        raise SegmentError(f"{manifest.handle} is unsigned: put segment.sign(key)")
    if expired(manifest, now_s):
        raise SegmentError(
            f"{manifest.handle}: expires_at_s={manifest.expires_at_s} has passed at {now_s:.0f}"
        )
    n_bytes = tensor_bytes(manifest)
    if max_bytes is not None and n_bytes > max_bytes:
        raise StoreError(
            f"{manifest.handle} has {n_bytes} bytes, the store holds {max_bytes}: raise max_bytes"
        )
    manifest.tensor_digests.check(segment.keys, segment.values)
    return manifest


def taken(handle: str) -> SegmentError:
    """What ``put`` raises for a handle that exists."""
    return SegmentError(f"{handle} exists: segments are immutable, give a new handle")


def check_own(manifest: Manifest, handle: str) -> None:
    """Raises ``SegmentError`` for the manifest of another handle."""
    if manifest.handle != handle:
        raise SegmentError(f"{handle} holds the segment {manifest.handle!r}: the store was altered")


def check_found(manifest: Manifest, handle: str, now_s: float) -> Manifest:
    """``manifest`` if it is that of ``handle`` and alive; raises as ``SegmentStore.manifest``."""
    check_own(manifest, handle)
    if expired(manifest, now_s):
        raise SegmentNotFound(handle)
    return manifest


def expired(manifest: Manifest, now_s: float) -> bool:
    return bool(manifest.expires_at_s) and now_s >= manifest.expires_at_s


def tensor_bytes(manifest: Manifest) -> int:
    """Of keys and values together."""
    layers, heads, tokens, dim = manifest.shape
    return 2 * layers * heads * tokens * dim * _ITEM_BYTES[manifest.dtype]


def surplus(manifests: Iterable[Manifest], now_s: float, max_bytes: int | None) -> list[Manifest]:
    """What has to go: all that has expired, then the oldest until the rest fits ``max_bytes``.

    Times of creation are whole seconds; segments of the same second go by handle.
    """
    gone: list[Manifest] = []
    live: list[Manifest] = []
    for manifest in manifests:
        (gone if expired(manifest, now_s) else live).append(manifest)
    if max_bytes is not None:
        excess = sum(map(tensor_bytes, live)) - max_bytes
        for manifest in sorted(live, key=lambda m: (m.created_at, m.handle)):
            if excess <= 0:
                break
            gone.append(manifest)
            excess -= tensor_bytes(manifest)
    return gone
