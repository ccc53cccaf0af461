"""Opens the store that a URL names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from lcguard.store.base import SegmentStore, StoreError

_KINDS = "memory://NAME, file:///absolute/path, redis://host:port/db or rediss://host:port/db"


def open_store(
    url: str,
    *,
    max_bytes: int | None = None,
    timeout_s: float = 10.0,
    clock: Callable[[], float] = time.time,
) -> SegmentStore:
    """The store of ``memory://NAME``, ``file:///abs/path`` or a bare path, ``redis[s]://...``.

    Args:
        url: a redis URL may hold a password: it is in no message.
        max_bytes: bound on the tensor bytes of all segments together; manifests and file headers,
            a few kB each, come on top. Putting above it removes the oldest. None: unbounded.
        timeout_s: of a whole operation on a server.
        clock: Unix time in seconds.

    Raises:
        StoreError: an unknown kind, a bound below 1, or a store that cannot be reached.
    """
    # here: what only reads manifests needs none of their libraries
    from lcguard.store.files import FileStore
    from lcguard.store.memory import MemoryStore
    from lcguard.store.redis import RedisStore

    if max_bytes is not None and max_bytes < 1:
        raise StoreError(f"max_bytes={max_bytes}: give at least 1, or None for no bound")
    scheme, separator, rest = url.partition("://")
    if not separator:
        # "redis:password@host" is a slip, and must not become the name of a folder.
        if not url or re.match(r"[a-z]+:", url):
            raise StoreError(f"the store's URL is empty or lacks '//': use a path, {_KINDS}")
        return FileStore(Path(url), max_bytes=max_bytes, clock=clock)
    if scheme == "memory":
        return MemoryStore(rest, max_bytes=max_bytes, clock=clock)
    if scheme == "file":
        if not rest.startswith("/"):
            raise StoreError(f"file://{rest}: the path is not absolute: write three slashes")
        return FileStore(Path(unquote(rest)), max_bytes=max_bytes, clock=clock)
    if scheme in ("redis", "rediss"):
        return RedisStore(url, max_bytes=max_bytes, clock=clock, timeout_s=timeout_s)
    raise StoreError(f"the store's URL has the scheme {scheme[:20]!r}: use a path, {_KINDS}")
