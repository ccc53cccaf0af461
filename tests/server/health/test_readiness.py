"""Ready means that the store writes, reads and deletes, and that three clocks agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.health.clocks import LIMIT_S, Clocks
from lcguard.server.health.readiness import Readiness, Watch
from lcguard.store.files import FileStore
from lcguard.store.line import StoreLine
from lcguard.store.redis import RedisStore
from tests.server.gateway.test_upstream import Connection, ask
from tests.store.places import running_redis

HOUR_S = 3600.0


def dated(offset_s: float | None) -> Callable[[Connection], Awaitable[None]]:
    """An upstream whose clock differs by so much; None: its answers have no date."""

    async def answer(connection: Connection) -> None:
        at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + (offset_s or 0)))
        date = f"Date: {at}\r\n" if offset_s is not None else ""
        await connection.send(f"HTTP/1.1 200 OK\r\n{date}Content-Length: 0\r\n\r\n".encode())

    return answer


@pytest.fixture
def redis_store(tmp_path: Path) -> Iterator[tuple[RedisStore, Any]]:
    with running_redis(tmp_path) as (port, _):
        store = RedisStore(f"redis://127.0.0.1:{port}/0")
        with import_module("redis").Redis(port=port) as client:
            yield store, client
        store.close()


def check(store: Any, engine_s: float | None, own_s: float = 0.0) -> str:
    """What the check says where the engine's clock and the proxy's own are off by so much."""

    async def use(upstream: Upstream) -> str:
        line = StoreLine(60)
        try:
            return await Clocks(upstream, store, line, lambda: time.time() + own_s).check()
        except ProxyError as error:
            return error.message if (error.status, error.code) == (503, "clock") else repr(error)
        finally:
            line.close()

    return str(ask(dated(engine_s), use)[0])


def test_clocks_that_agree(redis_store: Any, tmp_path: Path) -> None:
    for store in (redis_store[0], FileStore(tmp_path / "root")):
        assert check(store, 0.0) == "within 5 s"
        assert check(store, None) == "within 5 s"
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("off_s", [HOUR_S, -HOUR_S, 4 * LIMIT_S])
def test_the_reason_names_the_clock(redis_store: Any, tmp_path: Path, off_s: float) -> None:
    """Whose it is: the engine's is off, or the proxy's own is, so that only the store shows it."""
    way = "ahead of" if off_s > 0 else "behind"
    store = redis_store[0]
    assert f" s {way} the proxy's" in check(store, off_s)
    assert check(store, off_s).startswith("the engine's clock is ")
    for other in (store, FileStore(tmp_path / "root")):
        assert f" s {way} the proxy's" in check(other, None, own_s=-off_s)
        assert check(other, None, own_s=-off_s).startswith("the store's clock is ")


def test_a_full_or_read_only_store_is_not_ready(redis_store: Any) -> None:
    store, client = redis_store
    readiness = Readiness()

    async def look() -> list[str]:
        line = StoreLine(60)

        async def works() -> str:
            await line.run(store.check)
            return "works"

        await Watch(readiness, {"store": works}, 1.0).look()
        line.close()
        return readiness.reasons()

    assert asyncio.run(look()) == []
    client.config_set("maxmemory", 1)
    (reason,) = asyncio.run(look())
    assert "out of memory" in reason
    client.config_set("maxmemory", 0)
    client.replicaof("127.0.0.1", 1)
    (reason,) = asyncio.run(look())
    assert "read-only replica" in reason
    client.replicaof("NO", "ONE")
    assert asyncio.run(look()) == []
    assert readiness.ready
