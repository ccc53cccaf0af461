"""Stores that do not answer, are full or read only, against real servers that are stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.store import StoreError
from lcguard.store.line import StoreLine
from lcguard.store.redis import RedisStore
from tests.store.places import KEY, A, B, running_redis, signed


class Stopped:
    """A Redis server that is stopped, its sockets open."""

    def __init__(self, port: int, process: Any) -> None:
        self.url, self._process = f"redis://127.0.0.1:{port}/0", process

    def __enter__(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Stopped]:
    with running_redis(tmp_path) as (port, process):
        stopped = Stopped(port, process)
        try:
            yield stopped
        finally:
            process.send_signal(signal.SIGCONT)


def test_every_operation_on_a_stopped_server_ends(server: Stopped) -> None:
    store, hasty = RedisStore(server.url), RedisStore(server.url, timeout_s=0.4)
    store.put(signed())
    with server:
        for call in (
            lambda: hasty.put(signed(B)),
            lambda: hasty.manifest(A),
            lambda: hasty.load(A, KEY),
            lambda: hasty.delete(A),
            lambda: hasty.retire(A),
            hasty.handles,
            hasty.sweep,
            hasty.check,
            hasty.time_s,
        ):
            with pytest.raises(StoreError, match=r"in time|took longer"):
                call()
    assert store.manifest(A).handle == A
    store.check()
    store.close()
    hasty.close()


def test_a_server_that_answers_each_time_a_little_late_ends_too(
    server: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No single answer is late, the whole is: counted in answers, not in seconds."""
    store = RedisStore(server.url, timeout_s=100.0)
    store.put(signed())
    clock = [time.monotonic()]
    monkeypatch.setattr("lcguard.store.redis.time.monotonic", lambda: clock[0])
    answered, getrange = [], store._client.getrange

    def slow(*arguments: Any) -> Any:
        answered.append(1)
        clock[0] += 40.0
        return getrange(*arguments)

    monkeypatch.setattr(store._client, "getrange", slow)
    with pytest.raises(StoreError, match="took longer than 100 s"):
        store.load(A, KEY)
    assert len(answered) == 3  # of the manifest and four layers
    store.close()


def test_check_means_a_write_a_read_and_a_delete(server: Stopped) -> None:
    store, client = RedisStore(server.url), import_module("redis").Redis.from_url(server.url)
    store.check()
    assert client.keys("*") == []
    client.config_set("maxmemory", 1)
    with pytest.raises(StoreError, match="out of memory: raise its maxmemory"):
        store.check()
    client.config_set("maxmemory", 0)
    client.replicaof("127.0.0.1", 1)  # a replica of nobody is read only all the same
    with pytest.raises(StoreError, match="read-only replica"):
        store.check()
    client.replicaof("NO", "ONE")
    store.check()
    client.acl_setuser("default", commands=["-unlink"])
    with pytest.raises(StoreError, match="refuses"):
        store.check()
    client.close()
    store.close()


def test_a_call_is_polled_while_the_store_hangs_and_undone_when_it_comes_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("lcguard.store.line.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    line, go, undone = StoreLine(timeout_s=0.05), threading.Event(), threading.Event()
    call = line.submit(lambda: go.wait() and "late", undone.set)
    assert not call.ended()
    now_s[0] += 0.05
    assert call.ended()
    with pytest.raises(StoreError, match=r"did not answer within 0\.05 s"):
        call.result()
    assert not undone.is_set()
    go.set()
    assert undone.wait(60)
    line.close()


def test_what_nobody_wants_is_undone_or_never_begun() -> None:
    line, go, events = StoreLine(timeout_s=600, threads=1), threading.Event(), []
    done = threading.Event()
    running = line.submit(
        lambda: go.wait() and events.append("ran"), lambda: events.append("undone")
    )
    waiting = line.submit(lambda: events.append("never"), lambda: events.append("nor this"))
    waiting.drop()
    running.drop()
    go.set()
    line.submit(done.set)
    assert done.wait(60)
    assert events == ["ran", "undone"]
    ended = line.submit(lambda: events.append("ended"), done.set)
    while not ended.ended():
        time.sleep(0.001)
    done.clear()
    ended.drop()
    assert done.wait(60)
    line.close()


def test_the_event_loop_goes_on_and_stops_waiting(server: Stopped) -> None:
    store, line = RedisStore(server.url), StoreLine(timeout_s=0.2)

    async def run() -> int:
        turns, ended = 0, False

        async def others() -> None:
            nonlocal turns
            while not ended:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.ensure_future(others())
        with server, pytest.raises(StoreError, match="did not answer within"):
            await line.run(store.manifest, A)
        ended = True
        await beside
        return turns

    assert asyncio.run(run()) > 1
    line.close()
    store.close()


def test_errors_of_a_call_pass_through() -> None:
    async def run() -> None:
        line = StoreLine(timeout_s=60)

        def fails() -> None:
            raise ValueError("its own")

        assert await line.run(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(ValueError, match="its own"):
            await line.run(fails)
        call = line.submit(fails)
        while not call.ended():
            await asyncio.sleep(0.001)
        with pytest.raises(ValueError, match="its own"):
            call.result()
        line.close()

    asyncio.run(run())
