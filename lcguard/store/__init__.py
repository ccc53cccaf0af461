"""Segment stores: where guarded segments live between two hops.

Importing this package loads no torch: the kinds of stores are in modules of their own.
"""

from __future__ import annotations

from lcguard.store.base import SegmentNotFound, SegmentStore, StoreError, check_handle
from lcguard.store.open import open_store

__all__ = ["SegmentNotFound", "SegmentStore", "StoreError", "check_handle", "open_store"]
