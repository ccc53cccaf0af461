"""A handle that is retired: what was there is gone, and a late writer puts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lcguard.manifest import SegmentError
from lcguard.store import SegmentNotFound, StoreError
from tests.store.places import KEY, A, B, Place, same_bits, signed, together


@pytest.mark.parametrize("before", [True, False])
def test_a_late_writer_puts_nothing(store: Any, before: bool) -> None:
    if before:
        store.put(signed())
    store.put(signed(B))
    store.retire(A)
    with pytest.raises(SegmentError, match="exists"):
        store.put(signed())
    for read in (store.manifest, lambda handle: store.load(handle, KEY)):
        with pytest.raises(SegmentNotFound):
            read(A)
    assert (store.handles(), store.delete(A)) == ([B], False)
    store.retire(A)  # twice is once
    assert same_bits(store.load(B, KEY), signed(B)) or store.handles() == [B]


def test_of_a_writer_and_a_retirer_at_once_nothing_is_left(store: Any) -> None:
    for i in range(20):
        handle = f"{A}{i:02}"
        together(lambda h=handle: store.put(signed(h)), lambda h=handle: store.retire(h))
        with pytest.raises(SegmentNotFound):
            store.manifest(handle)
    assert store.handles() == []


def test_a_retired_handle_is_forgotten_later(place: Place, store: Any) -> None:
    store.retire(A)
    assert store.sweep() == 0
    with pytest.raises(SegmentError, match="exists"):
        store.put(signed())
    if place.kind == "redis":  # the server's own expiry
        (name,) = place.client.keys("lcguard:{*")
        assert 0 < place.client.pttl(name) <= 600_000
        return
    place.clock.now_s += 601
    store.sweep()
    store.retire(B)  # memory looks when there is something to add
    store.put(signed())
    assert store.handles() == [A]


def test_a_folder_of_somebody_else_is_not_retired(tmp_path: Path, file_store: Any) -> None:
    theirs = tmp_path / "root" / A
    theirs.mkdir()
    (theirs / "file").write_text("x")
    with pytest.raises(StoreError, match="move it out"):
        file_store.retire(A)
    assert os.listdir(tmp_path / "root") == [A]
