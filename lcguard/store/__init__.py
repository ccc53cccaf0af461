"""Segment stores: where guarded segments live between two hops."""

from __future__ import annotations

from lcguard.store.base import (
    SegmentNotFound,
    SegmentStore,
    StoreError,
    check_handle,
    open_store,
)
from lcguard.store.files import FileStore
from lcguard.store.memory import MemoryStore
from lcguard.store.redis import RedisStore

__all__ = [
    "FileStore",
    "MemoryStore",
    "RedisStore",
    "SegmentNotFound",
    "SegmentStore",
    "StoreError",
    "check_handle",
    "open_store",
]
