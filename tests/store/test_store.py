"""What every segment store keeps to, over memory, files and a real Redis or Valkey server."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from lcguard import segment_folder
from lcguard.manifest import SegmentError
from lcguard.segment import KVSegment
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE
from lcguard.store import SegmentNotFound, SegmentStore, StoreError, files, open_store
from lcguard.store.files import FileStore
from lcguard.store.redis import RedisStore

KEY = bytes(range(32))
A, B, C = ("a" * 16, "b-_9" * 8, "C" * 128)
SHAPE = 2, 2, 5, 8
SEGMENT_BYTES = 2 * 4 * 2 * 2 * 5 * 8
"""Tensor bytes of a float32 segment of this shape."""
FORKS = multiprocessing.get_context("fork")


def config() -> PretrainedConfig:
    return CONFIG_MAPPING["llama"](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )


def unsigned(
    handle: str = A,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    created: str = "",
    **fields: Any,
) -> KVSegment:
    """Random bits of ``SHAPE``, NaN payloads and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    size = (*SHAPE[:-1], SHAPE[-1] * dtype.itemsize)
    bits = [torch.randint(256, size, generator=generator).to(torch.uint8) for _ in range(2)]
    segment = KVSegment.create(
        bits[0].view(dtype), bits[1].view(dtype), config(), model_id="m", handle=handle, **fields
    )
    changes = {"created_at": created} if created else {}
    return replace(segment, manifest=segment.manifest.model_copy(update=changes))


def signed(handle: str = A, **options: Any) -> KVSegment:
    return unsigned(handle, **options).sign(KEY)


def same_bits(one: KVSegment, other: KVSegment) -> bool:
    return one.manifest == other.manifest and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((one.keys, other.keys), (one.values, other.values))
    )


class Clock:
    """Starts now, because a server and a file system keep their own time."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port and process of a server of its own, without persistence."""
    pytest.importorskip("redis", reason="the redis package is not installed")
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("neither valkey-server nor redis-server is on PATH: apt install redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--save", "", "--appendonly", "no", *options], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=60).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, f"{program} ended with {process.returncode}"
                time.sleep(0.02)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_redis(tmp_path_factory.mktemp("redis")) as (port, _):
        yield port


@dataclass
class Place:
    """Where one store lies, and how to get behind its back."""

    kind: str
    url: str
    clock: Clock
    root: Path
    client: Any = None
    opened: list[SegmentStore] | None = None

    def open(self, **options: Any) -> Any:
        store = open_store(self.url, clock=self.clock, **options)
        self.opened = [*(self.opened or []), store]
        return store

    def alter(self, store: Any, handle: str, part: str) -> None:
        """Changes one byte of the keys, of the values or of the manifest."""
        if self.kind == "memory":
            segment = store._shelf.segments[handle]
            if part == "manifest":
                other = replace(segment, manifest=segment.manifest.model_copy(update={"hop": 7}))
                store._shelf.segments[handle] = other
            else:
                getattr(segment, part).view(torch.uint8)[0, 0, 0, 0] ^= 1
        elif self.kind == "files":
            path = self.root / handle / (MANIFEST_FILE if part == "manifest" else TENSOR_FILE)
            data = bytearray(path.read_bytes())
            where = {"keys": -SEGMENT_BYTES, "values": -1}
            data[where.get(part) or data.index(b'"hop":0') + 6] ^= 1
            path.write_bytes(data)
        else:
            ends = {"manifest": ":manifest", "keys": ":k:1", "values": ":v:0"}[part]
            (name,) = self.client.keys(f"lcguard:{{{handle}}}*{ends}")
            data = bytearray(self.client.get(name))
            data[data.index(b'"hop":0') + 6 if part == "manifest" else -1] ^= 1
            self.client.set(name, bytes(data))

    def swap(self, store: Any, source: str, target: str) -> None:
        """Stores what lies under ``source`` under ``target`` as well."""
        if self.kind == "memory":
            store._shelf.segments[target] = store._shelf.segments[source]
        elif self.kind == "files":
            shutil.copytree(self.root / source, self.root / target)
        else:
            for name in self.client.keys(f"lcguard:{{{source}}}*"):
                self.client.copy(name, name.replace(source.encode(), target.encode()))

    def left(self, store: Any) -> list[str]:
        """Whatever lies in the store, visible or not."""
        if self.kind == "memory":
            return sorted(store._shelf.segments)
        if self.kind == "files":
            return sorted(os.listdir(self.root))
        return sorted(name.decode() for name in self.client.keys("*"))


@pytest.fixture(params=["memory", "files", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind, root, client = request.param, tmp_path / "root", None
    url = {"memory": "memory://contract", "files": root.as_uri()}.get(kind, "")
    if kind == "redis":
        port = request.getfixturevalue("redis_port")
        url = f"redis://127.0.0.1:{port}/0"
        client = import_module("redis").Redis(port=port)
        client.flushall()
    place = Place(kind, url, Clock(), root, client)
    yield place
    for store in place.opened or []:
        store.close()
        store.close()
    if client is not None:
        client.close()


@pytest.fixture
def store(place: Place) -> Any:
    return place.open()


@pytest.fixture
def file_store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "root", clock=Clock())


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Results or exceptions of the actions, started at once in a thread each."""
    start, results = threading.Barrier(len(actions)), [None] * len(actions)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = actions[index]()
        except Exception as error:
            results[index] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_fork(action: Callable[[], None]) -> int:
    """The exit code of ``action`` in a process of its own."""
    process = FORKS.Process(target=action)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_round_trip_bit_for_bit(store: Any, dtype: str) -> None:
    segment = signed(dtype=getattr(torch, dtype), audience="analyst", expires_at_s=2**32)
    assert not bool(torch.isfinite(segment.keys).all()) or dtype not in ("bfloat16", "float16")
    store.put(segment)
    loaded = store.load(A, KEY)
    assert same_bits(loaded, segment)
    assert (str(loaded.keys.device), loaded.keys.is_contiguous()) == ("cpu", True)
    assert store.manifest(A) == segment.manifest
    assert store.handles() == [A]


def test_tensors_that_are_not_contiguous(store: Any) -> None:
    segment = signed()
    turned = segment.keys.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    store.put(replace(segment, keys=turned.requires_grad_()))
    assert same_bits(store.load(A, KEY), segment)


def test_neither_side_can_change_what_is_stored(store: Any) -> None:
    segment = signed()
    store.put(segment)
    kept = KVSegment(segment.keys.clone(), segment.values.clone(), segment.manifest)
    segment.keys.zero_()
    loaded = store.load(A, KEY)
    loaded.values.zero_()
    loaded.manifest.rope["theta"] = store.manifest(A).rope["theta"] = 1
    again = store.load(A, KEY)
    assert torch.equal(again.keys.view(torch.uint8), kept.keys.view(torch.uint8))
    assert torch.equal(again.values.view(torch.uint8), kept.values.view(torch.uint8))


def test_segments_are_immutable(store: Any) -> None:
    first = signed(seed=1)
    store.put(first)
    for second in (signed(seed=2), first):
        with pytest.raises(SegmentError, match=f"{A} exists"):
            store.put(second)
    assert same_bits(store.load(A, KEY), first)
    assert store.handles() == [A]


def test_what_put_refuses(place: Place, store: Any) -> None:
    segment = signed()
    wrong = replace(segment, keys=torch.zeros_like(segment.keys))
    past = signed(expires_at_s=int(place.clock()))
    cases = (
        (unsigned(), f"{A} is unsigned"),
        (signed(""), "handle '' is not 16 to 128"),
        (wrong, "keys: SHA-256"),
        (past, "has passed"),
    )
    for case, message in cases:
        with pytest.raises(SegmentError, match=message) as caught:
            store.put(case)
        assert "\n" not in str(caught.value)
    assert place.left(store) == []


@pytest.mark.parametrize(
    "handle",
    [
        "",
        "a" * 15,
        "a" * 129,
        "../" + "a" * 16,
        "a" * 16 + "/..",
        "/etc/passwd-passwd-passwd",
        "a" * 16 + "\n",
        "a" * 16 + "\0",
        "*" * 16,
        "." * 16,
        "a" * 15 + "\u00e9",
        "{a}:" + "a" * 16,
    ],
)
def test_handles_that_are_no_names(store: Any, handle: str) -> None:
    manifest = signed().manifest.model_copy(update={"handle": handle})
    calls: Sequence[Callable[[], Any]] = (
        lambda: store.put(replace(signed(), manifest=manifest)),
        lambda: store.manifest(handle),
        lambda: store.load(handle, KEY),
        lambda: store.delete(handle),
    )
    for call in calls:
        with pytest.raises(SegmentError, match="is not 16 to 128 letters") as caught:
            call()
        assert not isinstance(caught.value, SegmentNotFound)


def test_missing_and_deleted(place: Place, store: Any) -> None:
    for seed in range(2):
        for call in (lambda: store.manifest(A), lambda: store.load(A, KEY)):
            with pytest.raises(SegmentNotFound, match=f"{A}: no such segment"):
                call()
        assert store.delete(A) is False
        segment = signed(seed=seed)
        store.put(segment)
        assert same_bits(store.load(A, KEY), segment)
        assert store.delete(A) is True
        assert (store.handles(), place.left(store)) == ([], [])


def test_expiry(place: Place, store: Any) -> None:
    end_s = int(place.clock()) + 3600  # a real server must not get there first
    for handle, expires_at_s in ((A, end_s), (B, end_s + 60), (C, 0)):
        store.put(signed(handle, expires_at_s=expires_at_s))
    place.clock.now_s = end_s - 0.5
    assert (store.handles(), store.sweep()) == (sorted([A, B, C]), 0)
    place.clock.now_s = end_s
    for call in (lambda: store.manifest(A), lambda: store.load(A, KEY)):
        with pytest.raises(SegmentNotFound):
            call()
    assert store.handles() == sorted([B, C])
    store.load(B, KEY)
    assert any(A in name for name in place.left(store))
    assert (store.sweep(), store.sweep()) == (1, 0)
    assert not any(A in name for name in place.left(store))
    place.clock.now_s = 2**40
    assert (store.handles(), store.sweep()) == ([C], 1)
    store.load(C, KEY)


def test_another_deployment_key(store: Any) -> None:
    store.put(signed())
    with pytest.raises(SegmentError, match="was not made by this deployment's key"):
        store.load(A, bytes(32))


@pytest.mark.parametrize("part", ["manifest", "keys", "values"])
def test_one_altered_bit_is_refused(place: Place, store: Any, part: str) -> None:
    store.put(signed())
    store.load(A, KEY)
    place.alter(store, A, part)
    with pytest.raises(SegmentError, match="HMAC" if part == "manifest" else f"{part}: SHA") as e:
        store.load(A, KEY)
    assert not isinstance(e.value, SegmentNotFound)


def test_segments_cannot_change_places(place: Place, store: Any) -> None:
    segment = signed(A)
    store.put(segment)
    place.swap(store, A, B)
    for call in (lambda: store.manifest(B), lambda: store.load(B, KEY)):
        with pytest.raises(SegmentError, match=f"{B} holds the segment '{A}'"):
            call()
    # Removing the copy leaves the original.
    assert store.delete(B) is True
    assert same_bits(store.load(A, KEY), segment)
    assert not any(B in name for name in place.left(store))


def test_the_oldest_go_when_the_store_is_full(place: Place) -> None:
    store = place.open(max_bytes=2 * SEGMENT_BYTES)
    handles = [letter * 20 for letter in "wxyz"]
    for handle, second in zip(handles, (30, 10, 20, 5), strict=True):
        store.put(signed(handle, created=f"2026-01-01T00:00:{second:02d}+00:00"))
        store.load(handle, KEY)  # the new one never goes, however old
    # w, x; then y for x; then z for y.
    assert store.handles() == sorted([handles[0], handles[3]])
    with pytest.raises(StoreError, match="raise max_bytes"):
        place.open(max_bytes=SEGMENT_BYTES - 1).put(signed())
    with pytest.raises(SegmentError, match="exists"):
        store.put(signed(handles[3]))
    assert len(store.handles()) == 2


def test_sweep_enforces_the_bound(place: Place) -> None:
    unbounded = place.open()
    for second, handle in enumerate((C, A, B)):
        unbounded.put(signed(handle, created=f"2026-01-01T00:00:{second:02d}+00:00"))
    bounded = place.open(max_bytes=2 * SEGMENT_BYTES)
    assert (bounded.sweep(), bounded.sweep(), unbounded.sweep()) == (1, 0, 0)
    assert unbounded.handles() == sorted([A, B])
    # What has expired goes before what is alive.
    now_s = int(place.clock())
    unbounded.put(signed(C, created="2026-01-01T00:01:00+00:00", expires_at_s=now_s + 3600))
    place.clock.now_s = now_s + 3600.0
    bounded.put(signed("d" * 16))
    assert bounded.handles() == sorted([B, "d" * 16])


def test_of_rival_threads_one_wins_whole(store: Any) -> None:
    for handle in (A, B, C):
        segments = [signed(handle, seed=seed) for seed in range(4)]
        results = together(*(lambda s=s: store.put(s) for s in segments))
        lost = [r for r in results if r is not None]
        assert len(lost) == 3
        assert all(type(r) is SegmentError and "exists" in str(r) for r in lost), lost
        assert same_bits(store.load(handle, KEY), segments[results.index(None)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_of_rival_processes_one_wins_whole(place: Place) -> None:
    if place.kind == "memory":
        assert not place.open().shared
        return
    handles = [f"{index:016d}" for index in range(10)]
    ours, theirs = FORKS.Pipe()

    def rival() -> None:
        with closing(open_store(place.url)) as store:
            segments = [signed(handle, seed=1) for handle in handles]
            theirs.send("ready")
            theirs.recv()
            won = []
            for segment in segments:
                try:
                    store.put(segment)
                    won.append(segment.manifest.handle)
                except SegmentError:
                    pass
            theirs.send((won, [segment.manifest.encode() for segment in segments]))

    process = FORKS.Process(target=rival)
    process.start()
    store = place.open()
    assert store.shared
    segments = [signed(handle, seed=2) for handle in handles]
    assert ours.recv() == "ready"
    ours.send("go")
    mine = []
    for segment in segments:
        try:
            store.put(segment)
            mine.append(segment.manifest.handle)
        except SegmentError:
            pass
    won, manifests = ours.recv()
    process.join()
    assert sorted(mine + won) == handles
    assert store.handles() == handles
    for index, handle in enumerate(handles):
        expected = segments[index].manifest.encode() if handle in mine else manifests[index]
        assert store.load(handle, KEY).manifest.encode() == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("place", ["files", "redis"], indirect=True)
def test_a_writer_that_dies_before_its_commit(place: Place, monkeypatch: Any) -> None:
    owner, step = {"files": (segment_folder, "_flush"), "redis": (RedisStore, "_commit")}[
        place.kind
    ]

    def killed() -> None:
        setattr(owner, step, lambda *_: os._exit(9))
        open_store(place.url).put(signed(seed=1))

    assert in_fork(killed) == 9
    store = place.open()
    remains = place.left(store)
    assert remains != []
    assert (store.handles(), store.delete(A)) == ([], False)
    with pytest.raises(SegmentNotFound):
        store.manifest(A)
    store.sweep()
    if place.kind == "files":
        # Younger than the grace period it may be a live writer's.
        assert place.left(store) == remains
        place.clock.now_s += 700
        assert (store.sweep(), store.sweep(), place.left(store)) == (1, 0, [])
    else:
        # The server removes the rest.
        assert all(0 < place.client.pttl(name) <= 600_000 for name in place.left(store))
    segment = signed(seed=2)
    store.put(segment)
    assert same_bits(store.load(A, KEY), segment)


def test_rival_sweeps_and_deletes_count_once(place: Place) -> None:
    store = place.open()
    now_s = int(place.clock())
    handles = [f"{index:016d}" for index in range(8)]
    for handle in handles:
        store.put(signed(handle, expires_at_s=now_s + 500))
    store.put(signed(A))
    place.clock.now_s = now_s + 500.0
    assert sum(together(*[store.sweep] * 3)) == len(handles)
    assert sorted(together(*[lambda: store.delete(A)] * 3)) == [False, False, True]
    assert place.left(store) == []


def test_readers_of_what_is_deleted_meanwhile(store: Any) -> None:
    segments = [signed(f"{index:016d}", seed=index) for index in range(15)]

    def read() -> int:
        found = 0
        for segment in segments:
            while segment.manifest.handle not in deleted:
                try:
                    assert same_bits(store.load(segment.manifest.handle, KEY), segment)
                    found += 1
                except SegmentNotFound:
                    time.sleep(0.001)
        return found

    def churn() -> int:
        for segment in segments:
            try:
                store.put(segment)
                store.load(segment.manifest.handle, KEY)
                assert store.delete(segment.manifest.handle)
            finally:
                deleted.add(segment.manifest.handle)
        return 0

    deleted: set[str] = set()
    found, _ = results = together(read, churn)
    assert isinstance(found, int), results
    assert results == [found, 0]


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, folder in (
        (f"{tmp_path}/bare", "bare"),
        ("relative/deep", "relative/deep"),
        (f"file://{tmp_path}/with%20space", "with space"),
    ):
        store = open_store(url)
        store.put(signed())
        assert sorted(os.listdir(tmp_path / folder / A)) == [MANIFEST_FILE, TENSOR_FILE]
    for url, message in (
        ("", "empty"),
        ("redis:hunter2@host", "lacks '//'"),
        ("file://relative/path", "three slashes"),
        ("s3://bucket", "scheme 's3'"),
        ("/dev/null/x", "cannot be the store's folder"),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            open_store(url)
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="max_bytes=0"):
        open_store("memory://x", max_bytes=0)


def test_memory_is_shared_by_name_until_closed() -> None:
    one, two = open_store("memory://shared"), open_store("memory://shared")
    other, private = open_store("memory://other"), open_store("memory://")
    one.put(signed())
    assert same_bits(two.load(A, KEY), one.load(A, KEY))
    assert [s.handles() for s in (two, other, private)] == [[A], [], []]
    assert open_store("memory://").handles() == []
    one.close()
    one.close()
    assert two.handles() == [A]
    two.close()
    assert open_store("memory://shared").handles() == []


def test_files_are_the_owners_alone(tmp_path: Path, file_store: FileStore) -> None:
    file_store.put(signed())
    for path in (tmp_path / "root", tmp_path / "root" / A):
        assert path.stat().st_mode & 0o777 == 0o700


def test_check_says_whether_segments_could_be_put(place: Place, store: Any) -> None:
    store.check()
    store.put(signed())
    store.check()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_check_finds_a_root_that_is_gone_or_full(tmp_path: Path, file_store: FileStore) -> None:
    (tmp_path / "root").rename(tmp_path / "away")
    with pytest.raises(StoreError, match=f"{tmp_path}/root is no folder.*mount it"):
        file_store.check()
    (tmp_path / "away").rename(tmp_path / "root")
    file_store.check()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            file_store.check()
        except StoreError as error:
            os._exit(7 if "free space" in str(error) else 8)

    assert in_fork(limited) == 7
    assert os.listdir(tmp_path / "root") == []


@pytest.mark.parametrize("error", ["save_file", "write_bytes"])
def test_a_full_disk(
    tmp_path: Path, file_store: FileStore, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((segment_folder, error) if error == "save_file" else (Path, error)), full)
    with pytest.raises(StoreError, match=r"No space left.*free space") as caught:
        file_store.put(signed())
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "root") == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_real_limit_of_the_file_size(tmp_path: Path, file_store: FileStore) -> None:
    # The library that writes tensors has errors of its own.
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            file_store.put(signed())
        except StoreError:
            os._exit(7)

    assert in_fork(limited) == 7
    assert os.listdir(tmp_path / "root") == []


def test_deleted_between_manifest_and_tensors(
    file_store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_store.put(signed())
    read = segment_folder.map_tensors

    def late(folder: Path) -> Any:
        assert file_store.delete(A)
        return read(folder)

    monkeypatch.setattr(files, "map_tensors", late)
    with pytest.raises(SegmentNotFound):
        file_store.load(A, KEY)


def test_what_was_verified_is_not_mapped(tmp_path: Path, file_store: FileStore) -> None:
    segment = signed()
    file_store.put(segment)
    loaded = file_store.load(A, KEY)
    with (tmp_path / "root" / A / TENSOR_FILE).open("r+b") as file:
        file.seek(-SEGMENT_BYTES, os.SEEK_END)
        file.write(bytes(SEGMENT_BYTES))
    assert same_bits(loaded, segment)
    with pytest.raises(SegmentError, match="SHA-256"):
        file_store.load(A, KEY)


def test_a_damaged_folder_is_no_missing_one(tmp_path: Path, file_store: FileStore) -> None:
    file_store.put(signed())
    (tmp_path / "root" / A / TENSOR_FILE).unlink()
    with pytest.raises(SegmentError, match="unreadable") as caught:
        file_store.load(A, KEY)
    assert not isinstance(caught.value, SegmentNotFound)
    (tmp_path / "root" / A / MANIFEST_FILE).write_bytes(b"{}")
    with pytest.raises(SegmentError, match="manifest: ") as caught:
        file_store.manifest(A)
    assert not isinstance(caught.value, SegmentNotFound)
    fresh = FileStore(tmp_path / "root", max_bytes=1, clock=Clock())
    assert (fresh.handles(), fresh.sweep(), fresh.delete(A)) == ([], 0, True)


def test_nothing_foreign_is_removed(tmp_path: Path) -> None:
    clock, root = Clock(), tmp_path / "root"
    store = FileStore(root, max_bytes=1, clock=clock)
    names = [".git", ".cache.of-someone", "a-folder-of-somebody-else", f".{A}"]
    for name in names:
        (root / name).mkdir()
        (root / name / "file").write_text("x")
    clock.now_s += 10**6
    assert (store.sweep(), store.handles()) == (0, [])
    assert store.delete("a-folder-of-somebody-else") is False
    assert sorted(os.listdir(root)) == sorted(names)


def test_a_large_file_still_being_written_is_kept(tmp_path: Path, file_store: FileStore) -> None:
    clock = file_store._clock
    assert isinstance(clock, Clock)
    folder = tmp_path / "root" / f".{A}.abcd_123"
    folder.mkdir()
    (folder / TENSOR_FILE).write_bytes(b"x")
    os.utime(folder, (clock() - 5000, clock() - 5000))
    assert (file_store.sweep(), folder.exists()) == (0, True)
    os.utime(folder / TENSOR_FILE, (clock() - 5000, clock() - 5000))
    assert (file_store.sweep(), folder.exists()) == (1, False)


def test_what_is_being_removed_is_not_abandoned(
    tmp_path: Path, file_store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_store.put(signed())
    for path in (tmp_path / "root").rglob("*"):
        os.utime(path, (0, 0))
    remove, sweeps = shutil.rmtree, []

    def rival(path: Path, **options: Any) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        sweeps.append(FileStore(tmp_path / "root").sweep())
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rival)
    assert file_store.delete(A) is True
    assert (sweeps, os.listdir(tmp_path / "root")) == ([0], [])


def test_a_late_writer_does_not_commit_half_a_folder(
    tmp_path: Path, file_store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = segment_folder._flush

    def swept(path: Path) -> None:
        flush(path)
        if path.name == MANIFEST_FILE:
            assert FileStore(tmp_path / "root", grace_s=-60.0).sweep() == 1

    monkeypatch.setattr(segment_folder, "_flush", swept)
    with pytest.raises(StoreError, match="could not be written"):
        file_store.put(signed())
    assert os.listdir(tmp_path / "root") == []


def test_a_handle_put_anew_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    clock = Clock()
    one, two = (FileStore(tmp_path / "root", clock=clock) for _ in range(2))
    now_s = int(clock())
    one.put(signed(expires_at_s=now_s + 5))
    assert one.handles() == [A]  # and remembers its manifest
    two.delete(A)
    two.put(signed(expires_at_s=now_s + 500))
    clock.now_s = now_s + 10.0
    assert (one.sweep(), one.handles()) == (0, [A])
