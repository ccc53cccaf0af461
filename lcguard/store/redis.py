"""Segments in Redis (6.2 or later) or Valkey, for processes of several machines.

Under ``lcguard:{handle}:`` lie one value per layer for the keys, one per layer for the values, and
the manifest, which is written last and only where none is: before it nothing is visible. Values
are named by a nonce of their writer, which the manifest's value begins with: rival writers of one
handle cannot overwrite each other. ``lcguard:index`` orders handles by time of creation.

The server's own ``maxmemory`` bounds what it holds; with ``noeviction`` a full server refuses
(``StoreError``), with any other policy it drops values of live segments, which then do not load.
"""

from __future__ import annotations

import importlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import torch

from lcguard.manifest import Manifest, SegmentError
from lcguard.segment import KVSegment
from lcguard.store import redis_wire as wire
from lcguard.store.base import (
    GRACE_S,
    HANDLE,
    SegmentNotFound,
    StoreError,
    check_found,
    check_handle,
    check_new,
    expired,
    surplus,
    taken,
    tensor_bytes,
)


class _Began(threading.local):
    """When this thread's operation began, and how deep inside it is."""

    at_s = 0.0
    depth = 0


class RedisStore:
    """The segments of one database of one server, or of what answers for a cluster."""

    shared = True

    def __init__(
        self,
        url: str,
        *,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        grace_s: float = GRACE_S,
        timeout_s: float = 10.0,
    ) -> None:
        """
        Args:
            url: special characters of its password percent-encoded.
            max_bytes: besides the server's own bound; each put then reads all manifests.
            grace_s: how long values without a manifest last. Longer than any put takes; a slower
                one fails and leaves nothing.
            timeout_s: of a whole operation; of one answer of the server a quarter of it, and then
                another try.
        """
        try:
            self._redis: Any = importlib.import_module("redis")
        except ImportError:
            raise StoreError("the redis package is missing: pip install lcguard[store]") from None
        self._max_bytes, self._clock, self._grace_s = max_bytes, clock, grace_s
        self._timeout_s, self._began = timeout_s, _Began()
        answer_s = timeout_s / 4
        retry = importlib.import_module("redis.retry").Retry(
            importlib.import_module("redis.backoff").ConstantBackoff(0.02), 1
        )
        try:
            self._client: Any = self._redis.Redis.from_url(
                url, socket_timeout=answer_s, socket_connect_timeout=answer_s, retry=retry
            )
            options = self._client.connection_pool.connection_kwargs
            self._password = str(options.get("password") or "")
            self._where = f"redis at {options.get('host', 'localhost')}:{options.get('port', 6379)}"
            self.check()
        except (TypeError, ValueError):
            # Its text quotes parts of the URL, such as what follows a colon in the password.
            text = "write redis://[user:password@]host:port/db, special characters as %XX"
            raise StoreError(f"the redis URL is malformed: {text}") from None
        except StoreError:
            self._client.close()
            raise

    def __repr__(self) -> str:
        return f"RedisStore({self._where})"

    def put(self, segment: KVSegment) -> None:
        manifest = check_new(segment, self._clock(), self._max_bytes)
        n_bytes, most = wire.chunk_bytes(manifest), wire.VALUE_BYTES
        if n_bytes > most:
            raise StoreError(
                f"{manifest.handle} has {n_bytes} bytes a layer, redis takes {most}: "
                "split it into shorter segments"
            )
        with self._talking():
            if self._client.exists(wire.manifest_key(manifest.handle)):
                raise taken(manifest.handle)
            if self._max_bytes is not None:
                self._drop(self._max_bytes - tensor_bytes(manifest))
            self._write(segment)

    def manifest(self, handle: str) -> Manifest:
        return self._find(handle)[1]

    def load(self, handle: str, key: bytes) -> KVSegment:
        raw, manifest = self._find(handle)
        # Before anything is read: shape and dtype are then those that the key's owner signed.
        manifest.verify(key)
        n_bytes = wire.chunk_bytes(manifest)
        keys, values = (
            torch.empty(manifest.shape, dtype=getattr(torch, manifest.dtype)) for _ in range(2)
        )
        chunks = wire.chunk_keys(manifest, raw)
        for chunk, layer in zip(chunks, (*keys, *values), strict=True):
            with self._talking(first=False):
                # One byte more than expected: enough to see that a value is longer.
                data = self._client.getrange(chunk, 0, n_bytes)
            if len(data) != n_bytes:
                if self._read(handle) != raw:
                    raise SegmentNotFound(handle)
                raise SegmentError(
                    f"{handle}: {len(data)} bytes of layer {chunk.rpartition(':')[2]}, expected "
                    f"{n_bytes}: altered, or dropped by the server's maxmemory-policy"
                )
            wire.fill(layer, data)
        segment = KVSegment(keys, values, manifest)
        segment.verify(key)
        return segment

    def delete(self, handle: str) -> bool:
        raw = self._read(check_handle(handle))
        if not raw or raw == wire.RETIRED:
            return False
        with self._talking():
            try:
                found = self._remove(wire.decode(raw, handle), raw)
            except SegmentError:
                # A damaged manifest does not say where its values are.
                names = list(self._client.scan_iter(match=f"{wire.prefix(handle)}*"))
                found = bool(names and self._client.unlink(*names))
            if found:
                self._client.zrem(wire.INDEX, handle)
        return found

    def retire(self, handle: str) -> None:
        key, life_ms = wire.manifest_key(check_handle(handle)), round(self._grace_s * 1000)
        with self._talking():
            try:
                raw = self._client.set(key, wire.RETIRED, px=life_ms, get=True) or b""
            except self._redis.OutOfMemoryError:
                self.delete(handle)  # as nothing can be put, this is enough
                return
            with suppress(SegmentError):
                if raw and raw != wire.RETIRED:
                    self._client.unlink(*wire.chunk_keys(wire.decode(raw, handle), raw))
            self._client.zrem(wire.INDEX, handle)

    def handles(self) -> list[str]:
        now_s = self._clock()
        with self._talking():
            return sorted(m.handle for m, _ in self._segments() if not expired(m, now_s))

    def sweep(self) -> int:
        """As ``SegmentStore.sweep``; what the server's own expiry removed does not count."""
        with self._talking():
            return self._drop(self._max_bytes)

    def check(self) -> None:
        name, value = f"lcguard:check:{secrets.token_hex(8)}", secrets.token_bytes(4096)
        with self._talking():
            if not self._client.eval(wire.CHECK, 1, name, value, 60_000):
                raise StoreError(f"{self._where} does not give back what was written to it")

    def time_s(self) -> float:
        with self._talking():
            seconds, micros = self._client.time()
            return float(seconds) + float(micros) / 1e6

    def close(self) -> None:
        self._client.close()

    def _write(self, segment: KVSegment) -> None:
        manifest = segment.manifest
        raw = secrets.token_hex(16).encode() + b"\n" + manifest.encode()
        chunks = wire.chunk_keys(manifest, raw)
        life_s = self._grace_s
        if manifest.expires_at_s:
            life_s = min(life_s, manifest.expires_at_s - self._clock())
        entry = {manifest.handle: datetime.fromisoformat(manifest.created_at).timestamp()}
        try:
            for chunk, layer in zip(chunks, (*segment.keys, *segment.values), strict=True):
                self._check_time()
                self._client.set(chunk, wire.layer_bytes(layer), px=max(1, round(life_s * 1000)))
            # Before the commit, lest a crash leaves a segment that no bound ever counts.
            self._client.zadd(wire.INDEX, entry)
            state = self._commit(manifest, raw, chunks)
        except BaseException:
            with suppress(self._redis.RedisError):
                # Also the manifest: the commit may have been done and its answer lost.
                self._remove(manifest, raw)
            raise
        if state != 1:
            self._client.unlink(*chunks)
            if state == 0:
                raise taken(manifest.handle)
            raise StoreError(
                f"{manifest.handle}: writing took longer than {life_s:.0f} s or {self._where} "
                "dropped values: raise grace_s or the server's maxmemory"
            )
        with suppress(self._redis.RedisError):
            # Again: a sweep in between took the entry for that of a crashed writer.
            self._client.zadd(wire.INDEX, entry)

    def _commit(self, manifest: Manifest, raw: bytes, chunks: list[str]) -> int:
        names = [wire.manifest_key(manifest.handle), *chunks]
        expiry_ms = str(manifest.expires_at_s * 1000)
        return int(self._client.eval(wire.COMMIT, len(names), *names, raw, expiry_ms))

    def _remove(self, manifest: Manifest, raw: bytes) -> bool:
        """Removes manifest, where it is still ``raw``, and values in one step."""
        names = [wire.manifest_key(manifest.handle), *wire.chunk_keys(manifest, raw)]
        return bool(self._client.eval(wire.REMOVE, len(names), *names, raw))

    def _read(self, handle: str) -> bytes:
        """The manifest's value; empty where there is none."""
        with self._talking():
            return bytes(self._client.getrange(wire.manifest_key(handle), 0, wire.MANIFEST_BYTES))

    def _find(self, handle: str) -> tuple[bytes, Manifest]:
        raw = self._read(check_handle(handle))
        if not raw or raw == wire.RETIRED:
            raise SegmentNotFound(handle)
        return raw, check_found(wire.decode(raw, handle), handle, self._clock())

    def _segments(self) -> list[tuple[Manifest, bytes]]:
        """Of all readable segments; forgets those that the server's expiry removed."""
        listed = self._client.zrange(wire.INDEX, 0, -1, withscores=True)
        scores = {name.decode("ascii", "replace"): score for name, score in listed}
        handles = list(filter(HANDLE.fullmatch, scores))
        pipeline = self._client.pipeline(transaction=False)
        for handle in handles:
            pipeline.getrange(wire.manifest_key(handle), 0, wire.MANIFEST_BYTES)
        found: list[tuple[Manifest, bytes]] = []
        for handle, raw in zip(handles, pipeline.execute(), strict=True):
            if not raw:
                self._client.zrem(wire.INDEX, handle)
                if self._client.exists(wire.manifest_key(handle)):  # committed in between
                    self._client.zadd(wire.INDEX, {handle: scores[handle]})
                continue
            with suppress(SegmentError):
                found.append((wire.decode(raw, handle), raw))
        return found

    def _drop(self, max_bytes: int | None) -> int:
        """Removes the surplus above ``max_bytes``; returns how many went."""
        found = {manifest.handle: (manifest, raw) for manifest, raw in self._segments()}
        gone = 0
        for manifest in surplus((m for m, _ in found.values()), self._clock(), max_bytes):
            if self._remove(*found[manifest.handle]):
                self._client.zrem(wire.INDEX, manifest.handle)
                gone += 1
        return gone

    @contextmanager
    def _talking(self, first: bool = True) -> Iterator[None]:
        """Turns whatever the server or the connection raises into a ``StoreError``.

        ``first``: an operation begins here, unless one has begun around it.
        """
        if first and not self._began.depth:
            self._began.at_s = time.monotonic()
        self._check_time()
        self._began.depth += 1
        try:
            yield
        except self._redis.RedisError as error:
            reason = wire.explain(error, self._redis.exceptions, self._password)
            # The original error is not chained: nobody knows what a server quotes.
            raise StoreError(f"{self._where} {reason}") from None
        finally:
            self._began.depth -= 1

    def _check_time(self) -> None:
        if time.monotonic() > self._began.at_s + self._timeout_s:
            raise StoreError(
                f"{self._where} took longer than {self._timeout_s:g} s: is it overloaded?"
            )
