"""Segments in the memory of this process, shared by all that open the same name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcguard.manifest import Manifest
from lcguard.segment import KVSegment
from lcguard.store.base import (
    GRACE_S,
    SegmentNotFound,
    check_found,
    check_handle,
    check_new,
    expired,
    surplus,
    taken,
    tensor_bytes,
)


@dataclass
class _Shelf:
    """What one name stands for."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    segments: dict[str, KVSegment] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)
    """Handle to the time at which it may be forgotten."""
    users: int = 0


_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


class MemoryStore:
    """A view of the segments under ``name``; they go when its last view is closed.

    An empty name is shared with nobody. Bound and clock are the view's own.
    """

    shared = False

    def __init__(
        self,
        name: str = "",
        *,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name, self._max_bytes, self._clock = name, max_bytes, clock
        self._closed = False
        with _shelves_lock:
            self._shelf = _shelves.setdefault(name, _Shelf()) if name else _Shelf()
            self._shelf.users += 1

    def put(self, segment: KVSegment) -> None:
        # Copied before it is checked, so that nothing can change in between.
        own = KVSegment(_copy(segment.keys), _copy(segment.values), _own(segment.manifest))
        manifest = check_new(own, self._clock(), self._max_bytes)
        with self._shelf.lock:
            if manifest.handle in self._shelf.segments or manifest.handle in self._shelf.retired:
                raise taken(manifest.handle)
            if self._max_bytes is not None:
                self._drop(self._max_bytes - tensor_bytes(manifest))
            self._shelf.segments[manifest.handle] = own

    def manifest(self, handle: str) -> Manifest:
        return _own(self._find(handle).manifest)

    def load(self, handle: str, key: bytes) -> KVSegment:
        found = self._find(handle)
        found.manifest.verify(key)
        segment = KVSegment(_copy(found.keys), _copy(found.values), _own(found.manifest))
        segment.verify(key)
        return segment

    def delete(self, handle: str) -> bool:
        check_handle(handle)
        with self._shelf.lock:
            return self._shelf.segments.pop(handle, None) is not None

    def retire(self, handle: str) -> None:
        check_handle(handle)
        now_s = self._clock()
        with self._shelf.lock:
            old = [h for h, until_s in self._shelf.retired.items() if until_s <= now_s]
            for h in old:
                del self._shelf.retired[h]
            self._shelf.segments.pop(handle, None)
            self._shelf.retired[handle] = now_s + GRACE_S

    def handles(self) -> list[str]:
        now_s = self._clock()
        with self._shelf.lock:
            found = list(self._shelf.segments.items())
        return sorted(handle for handle, s in found if not expired(s.manifest, now_s))

    def sweep(self) -> int:
        with self._shelf.lock:
            return self._drop(self._max_bytes)

    def check(self) -> None:
        """Memory is there as long as the process is."""

    def time_s(self) -> None:
        """It has this machine's clock."""

    def close(self) -> None:
        with _shelves_lock:
            if self._closed:
                return
            self._closed = True
            self._shelf.users -= 1
            if self._name and not self._shelf.users:
                del _shelves[self._name]

    def _find(self, handle: str) -> KVSegment:
        check_handle(handle)
        with self._shelf.lock:
            found = self._shelf.segments.get(handle)
        if found is None:
            raise SegmentNotFound(handle)
        check_found(found.manifest, handle, self._clock())
        return found

    def _drop(self, max_bytes: int | None) -> int:
        """Removes the surplus above ``max_bytes``; the caller holds the lock."""
        manifests = [segment.manifest for segment in self._shelf.segments.values()]
        gone = surplus(manifests, self._clock(), max_bytes)
        for manifest in gone:
            del self._shelf.segments[manifest.handle]
        return len(gone)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _own(manifest: Manifest) -> Manifest:
    """A deep copy: the rotation in a manifest is a mutable dict."""
    return manifest.model_copy(deep=True)
