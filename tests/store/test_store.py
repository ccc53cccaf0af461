"""What every segment store keeps to, over memory, files and a real Redis or Valkey server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard import segment_folder
from lcguard.manifest import SegmentError
from lcguard.segment import KVSegment
from lcguard.store import SegmentNotFound, StoreError, open_store
from lcguard.store.redis import RedisStore
from tests.store.places import (
    FORKS,
    KEY,
    SEGMENT_BYTES,
    A,
    B,
    C,
    Place,
    in_fork,
    same_bits,
    signed,
    together,
    unsigned,
)


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
