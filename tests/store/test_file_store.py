"""The store of files: whose they are, what a full disk and rivals leave, what is removed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lcguard import segment_folder
from lcguard.manifest import SegmentError
from lcguard.segment_folder import MANIFEST_FILE, TENSOR_FILE
from lcguard.store import SegmentNotFound, StoreError, files, open_store
from lcguard.store.files import FileStore
from tests.store.places import (
    KEY,
    SEGMENT_BYTES,
    A,
    Clock,
    Place,
    in_fork,
    same_bits,
    signed,
)


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
