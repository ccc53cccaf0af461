"""What is particular to the Redis store, against a real server."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lcguard.manifest import SegmentError
from lcguard.store import SegmentNotFound, StoreError, open_store, redis_wire
from lcguard.store.redis import RedisStore
from tests.store.places import KEY, SEGMENT_BYTES, A, B, Clock, running_redis, same_bits, signed

PASSWORD = "hunter2:and@more"
QUOTED = "hunter2%3Aand%40more"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("redis")
    with running_redis(folder, "--requirepass", PASSWORD) as (port, _):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with import_module("redis").Redis(port=port, password=PASSWORD) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        yield client
        client.config_set("maxmemory", 0)


@pytest.fixture
def store(port: int, client: Any) -> Iterator[RedisStore]:
    store = RedisStore(f"redis://:{QUOTED}@127.0.0.1:{port}/0", clock=Clock())
    yield store
    store.close()


def names(client: Any) -> list[str]:
    return sorted(name.decode() for name in client.keys("*"))


def check_silent(error: BaseException) -> None:
    """One line, and the password neither in it nor in what a traceback prints."""
    assert "\n" not in str(error)
    shown = "".join(traceback.format_exception(error)) + repr(error)
    assert "hunter2" not in shown


def test_layout(store: RedisStore, client: Any) -> None:
    store.put(signed())
    chunks = [name for name in names(client) if name[-2] == ":"]
    assert [name.rpartition(f"lcguard:{{{A}}}:")[2][32:] for name in chunks] == [
        ":k:0",
        ":k:1",
        ":v:0",
        ":v:1",
    ]
    assert {client.strlen(name) for name in chunks} == {SEGMENT_BYTES // 4}
    assert names(client) == sorted([*chunks, f"lcguard:{{{A}}}:manifest", "lcguard:index"])
    assert {client.pttl(name) for name in names(client)} == {-1}


def test_every_value_of_a_segment_expires_with_it(store: RedisStore, client: Any) -> None:
    expires_at_s = int(time.time()) + 4000
    store.put(signed(expires_at_s=expires_at_s))
    left_ms = [client.pttl(name) for name in names(client) if A in name]
    assert len(left_ms) == 5
    now_ms = time.time() * 1000
    assert all(abs(now_ms + ms - expires_at_s * 1000) < 60_000 for ms in left_ms)


def test_the_servers_expiry_leaves_no_trace(store: RedisStore, client: Any) -> None:
    store.put(signed())
    store.put(signed(B))
    for name in names(client):
        if A in name:
            client.pexpire(name, 1)
    time.sleep(0.05)
    with pytest.raises(SegmentNotFound):
        store.load(A, KEY)
    assert (store.handles(), store.sweep()) == ([B], 0)
    assert client.zrange("lcguard:index", 0, -1) == [B.encode()]


def test_values_without_a_manifest_expire_soon(
    port: int, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://:{QUOTED}@127.0.0.1:{port}/0"
    store = RedisStore(url, grace_s=0.05)

    def slow(*arguments: Any) -> int:
        time.sleep(0.1)
        return RedisStore._commit(store, *arguments)

    monkeypatch.setattr(store, "_commit", slow)
    with pytest.raises(StoreError, match="raise grace_s"):
        store.put(signed())
    assert [name for name in names(client) if A in name] == []
    store.sweep()
    assert names(client) == []
    store.close()


def test_a_loser_leaves_the_winner_whole(
    store: RedisStore, client: Any, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, commit = signed(seed=1), store._commit

    def late(*arguments: Any) -> int:
        other = open_store(f"redis://:{QUOTED}@127.0.0.1:{port}/0")
        other.put(winner)
        other.close()
        return commit(*arguments)

    monkeypatch.setattr(store, "_commit", late)
    with pytest.raises(SegmentError, match=f"{A} exists"):
        store.put(signed(seed=2))
    assert same_bits(store.load(A, KEY), winner)
    assert len([name for name in names(client) if A in name]) == 5


def test_a_commit_whose_answer_was_lost(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, errors = store._commit, import_module("redis.exceptions")
    # The client sends it again.
    monkeypatch.setattr(store, "_commit", lambda *a: (commit(*a), commit(*a))[1])
    store.put(signed())
    store.load(A, KEY)

    def lost(*arguments: Any) -> int:
        assert commit(*arguments) == 1
        raise errors.TimeoutError("Timeout reading from socket")

    # Or gives up: what it was told to have failed is not there.
    monkeypatch.setattr(store, "_commit", lost)
    with pytest.raises(StoreError, match="did not answer in time"):
        store.put(signed(B))
    assert store.handles() == [A]
    assert [name for name in names(client) if B in name] == []


def test_a_sweep_during_a_put_does_not_lose_the_segment(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store._commit

    def swept(*arguments: Any) -> int:
        store.sweep()
        assert client.zcard("lcguard:index") == 0
        return commit(*arguments)

    monkeypatch.setattr(store, "_commit", swept)
    store.put(signed())
    assert store.handles() == [A]


def test_a_commit_during_a_sweep_stays_listed(
    store: RedisStore, client: Any, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.zadd("lcguard:index", {A: 5})  # of a writer that has not committed
    forget, segment = store._client.zrem, signed()

    def late(*arguments: Any) -> Any:
        other = open_store(f"redis://:{QUOTED}@127.0.0.1:{port}/0")
        other.put(segment)
        other.close()
        return forget(*arguments)

    monkeypatch.setattr(store._client, "zrem", late)
    assert (store.sweep(), store.handles()) == (0, [A])


def test_values_that_the_server_dropped(store: RedisStore, client: Any) -> None:
    store.put(signed())
    chunk = next(name for name in names(client) if name.endswith(":v:1"))
    client.append(chunk, b"x")
    with pytest.raises(SegmentError, match="321 bytes of layer 1, expected 320"):
        store.load(A, KEY)
    client.delete(chunk)
    with pytest.raises(SegmentError, match=r"0 bytes of layer 1.*maxmemory-policy") as caught:
        store.load(A, KEY)
    assert not isinstance(caught.value, SegmentNotFound)


def test_deleted_while_it_is_read(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(signed())
    read = store._find

    def late(handle: str) -> Any:
        found = read(handle)
        assert store.delete(handle)
        return found

    monkeypatch.setattr(store, "_find", late)
    with pytest.raises(SegmentNotFound):
        store.load(A, KEY)


@pytest.mark.parametrize("value", [b"x", b"0" * 32 + b"\n{}", b"\xff" * 40])
def test_a_manifest_that_is_none(store: RedisStore, client: Any, value: bytes) -> None:
    store.put(signed())
    client.set(f"lcguard:{{{A}}}:manifest", value)
    client.zadd("lcguard:index", {b"\xff/../": 1})
    with pytest.raises(SegmentError, match="manifest") as caught:
        store.load(A, KEY)
    assert not isinstance(caught.value, SegmentNotFound)
    assert (store.handles(), store.sweep()) == ([], 0)
    # Deleting finds the values all the same.
    assert store.delete(A) is True
    assert [name for name in names(client) if A in name] == []


def test_a_manifest_that_claims_many_layers(store: RedisStore, client: Any) -> None:
    manifest = signed().manifest.model_copy(update={"n_layers": 10**15})
    client.set(f"lcguard:{{{A}}}:manifest", b"0" * 32 + b"\n" + manifest.encode())
    with pytest.raises(SegmentError, match="at most 4096"):
        store.manifest(A)
    assert store.delete(A) is True


def test_a_full_server(store: RedisStore, client: Any) -> None:
    client.config_set("maxmemory", 1)
    with pytest.raises(StoreError, match="out of memory: raise its maxmemory") as caught:
        store.put(signed())
    check_silent(caught.value)
    client.config_set("maxmemory", 0)
    assert names(client) == []


def test_a_server_that_fills_up_at_the_commit(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store._commit

    def full(*arguments: Any) -> int:
        client.config_set("maxmemory", 1)
        return commit(*arguments)

    monkeypatch.setattr(store, "_commit", full)
    with pytest.raises(StoreError, match=r"out of memory|OOM"):
        store.put(signed())
    client.config_set("maxmemory", 0)
    assert [name for name in names(client) if A in name] == []


def test_a_layer_too_large_for_one_value(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_wire, "VALUE_BYTES", SEGMENT_BYTES // 4 - 1)
    with pytest.raises(StoreError, match=r"bytes a layer.*shorter segments"):
        store.put(signed())
    assert names(client) == []


def test_a_server_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_redis(tmp_path, "--requirepass", PASSWORD) as (port, process):
        store = RedisStore(f"redis://:{QUOTED}@127.0.0.1:{port}/0")
        store.put(signed())
        commit = store._commit

        def stopped(*arguments: Any) -> int:
            process.terminate()
            process.wait(60)
            return commit(*arguments)

        monkeypatch.setattr(store, "_commit", stopped)
        calls = (
            lambda: store.put(signed(B)),
            lambda: store.put(signed(B)),
            lambda: store.manifest(A),
            lambda: store.load(A, KEY),
            lambda: store.delete(A),
            store.handles,
            store.sweep,
            store.check,
            lambda: RedisStore(f"redis://:{QUOTED}@127.0.0.1:{port}/0"),
        )
        for call in calls:
            with pytest.raises(StoreError, match=f"redis at 127.0.0.1:{port} is not rea") as caught:
                call()
            check_silent(caught.value)
        store.close()


def test_no_password_in_messages(port: int, store: RedisStore) -> None:
    assert "hunter2" not in repr(store) + str(vars(store)["_client"])
    for url, message in (
        (f"redis://:hunter2wrong@127.0.0.1:{port}/0", "refuses the login"),
        (f"redis://127.0.0.1:{port}/0", "refuses the login"),
        (f"redis://:{QUOTED}@127.0.0.1:{port}/99", "DB index"),
        ("redis://:hunter2/x@127.0.0.1:1/0", "URL is malformed"),
        ("redis://user:12[hunter2@127.0.0.1:1/0", "URL is malformed"),
        (f"redis://:{QUOTED}@127.0.0.1:{port}/0?nonsense=1", "URL is malformed"),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            open_store(url)
        check_silent(caught.value)


def test_a_server_that_quotes_the_password(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = import_module("redis.exceptions")

    def quoting(*_: object) -> None:
        raise errors.ResponseError(f"unknown command 'AUTH', with args: '{PASSWORD}'\nmore")

    monkeypatch.setattr(store._client, "getrange", quoting)
    with pytest.raises(StoreError, match="ResponseError") as caught:
        store.manifest(A)
    check_silent(caught.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match=r"pip install lcguard\[store\]"):
        open_store("redis://127.0.0.1:1/0")
