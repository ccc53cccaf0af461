"""Segments as folders under one root, for processes of one machine or one shared disk.

A segment is a folder as ``lcguard.segment_folder`` writes it, named by its handle. It comes by one
rename and goes by one rename to a hidden name, so that every process sees it whole or not at all
and, of several that remove it, one does.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lcguard.manifest import Manifest, SegmentError
from lcguard.segment import KVSegment
from lcguard.segment_folder import MANIFEST_FILE, map_tensors, read_manifest, write_folder
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

_RETIRED_FILE = "retired"
"""Alone in the folder of a handle under which nothing may be put."""
_CHECK_BYTES = 4096
_TRIES = 8
"""Of rival writers that come between, more than one is no accident."""
# As named by write_folder and by _discard; nothing else that is hidden is ours to remove.
_LEFTOVER = re.compile(rf"\.({HANDLE.pattern})\.[A-Za-z0-9_]{{8,32}}")


class FileStore:
    """A root that holds segments and nothing else; made, for its owner only, where missing.

    A segment whose manifest is damaged is neither listed nor swept: delete it by its handle.
    """

    shared = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        grace_s: float = GRACE_S,
    ) -> None:
        """
        Args:
            grace_s: the age at which an unfinished folder counts as left by a crashed writer.
                Longer than any write takes; a slower writer fails and leaves nothing.
        """
        # Absolute, so that a later chdir does not move the store.
        self._root, self._max_bytes = Path(root).absolute(), max_bytes
        self._clock, self._grace_s = clock, grace_s
        self._seen: dict[str, Manifest] = {}
        """Manifests read before: they are immutable, and decoding thousands at each put is slow."""
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(self._root.stat().st_mode)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._root} cannot be the store's folder: {error}") from error
        if mode & 0o022:  # others could take segments away, and put old ones back
            raise StoreError(
                f"{self._root} may be written to by others (mode {mode:o}): chmod go-w it, or give "
                "a folder of its own"
            )

    def put(self, segment: KVSegment) -> None:
        manifest = check_new(segment, self._clock(), self._max_bytes)
        folder = self._folder(manifest.handle)
        if os.path.lexists(folder):
            raise taken(manifest.handle)
        if self._max_bytes is not None:
            self._drop(self._max_bytes - tensor_bytes(manifest))
        try:
            write_folder(folder, segment.keys, segment.values, manifest)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{manifest.handle} could not be written to {self._root}: {error}: "
                "free space or lower max_bytes"
            ) from error

    def manifest(self, handle: str) -> Manifest:
        folder = self._folder(handle)
        try:
            manifest = read_manifest(folder)
        except SegmentError as error:
            # Not asked whether the folder exists: a writer may have made it since.
            if isinstance(error.__cause__, FileNotFoundError):
                raise SegmentNotFound(handle) from error
            raise
        return check_found(manifest, handle, self._clock())

    def load(self, handle: str, key: bytes) -> KVSegment:
        folder, manifest = self._folder(handle), self.manifest(handle)
        # Before anything is copied: shape and dtype are then those that the key's owner signed.
        manifest.verify(key)
        try:
            mapped = KVSegment(*map_tensors(folder), manifest)
        except SegmentError as error:
            if os.path.lexists(folder):
                raise
            raise SegmentNotFound(handle) from error
        segment = KVSegment(mapped.keys.clone(), mapped.values.clone(), manifest)
        segment.verify(key)
        return segment

    def delete(self, handle: str) -> bool:
        folder = self._folder(handle)
        # Whatever else lies in the root under such a name is not ours.
        return os.path.lexists(folder / MANIFEST_FILE) and self._discard(folder, handle)

    def retire(self, handle: str) -> None:
        folder = self._folder(handle)
        hidden = self._root / f".{handle}.{secrets.token_hex(8)}"
        try:
            hidden.mkdir(mode=0o700)
            (hidden / _RETIRED_FILE).touch()
            for _ in range(_TRIES):
                if (folder / _RETIRED_FILE).exists():
                    return
                self.delete(handle)
                try:
                    os.rename(hidden, folder)
                except OSError:
                    if not os.path.lexists(folder):
                        raise
                    continue  # put or retired in between
                return
        except OSError as error:
            raise StoreError(f"{handle} cannot be retired in {self._root}: {error}") from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        raise StoreError(f"{folder} is no segment's folder: move it out of the store")

    def handles(self) -> list[str]:
        now_s = self._clock()
        return sorted(m.handle for m in self._segments() if not expired(m, now_s))

    def sweep(self) -> int:
        gone = self._drop(self._max_bytes)
        for name in self._names():
            folder = self._root / name
            if (match := _LEFTOVER.fullmatch(name)) and self._abandoned(folder):
                gone += self._discard(folder, match[1])
            elif (folder / _RETIRED_FILE).exists() and self._abandoned(folder):
                self._discard(folder, name)
        return gone

    def check(self) -> None:
        if not self._root.is_dir():
            raise StoreError(f"{self._root} is no folder that can be written to: mount it again")
        data = secrets.token_bytes(_CHECK_BYTES)
        path = self._root / f".check.{secrets.token_hex(8)}"
        try:
            try:
                path.write_bytes(data)
                same = path.read_bytes() == data
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self._root}: a test file could not be written, read and deleted: "
                f"{error.strerror}: free space, or mount it for writing"
            ) from error
        if not same:
            raise StoreError(f"{self._root} does not give back what was written to it")

    def time_s(self) -> float | None:
        """Of the machine that keeps the disk: it dates files."""
        path = self._root / f".clock.{secrets.token_hex(8)}"
        try:
            path.touch()
            try:
                return path.stat().st_mtime
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._root}: no file can be made there: {error}") from error

    def close(self) -> None:
        self._seen = {}

    def _folder(self, handle: str) -> Path:
        return self._root / check_handle(handle)

    def _names(self) -> list[str]:
        """Of all folders in the root."""
        try:
            with os.scandir(self._root) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise StoreError(f"{self._root} cannot be listed: {error}") from error

    def _segments(self) -> list[Manifest]:
        """Of all readable segments, expired or not."""
        found: dict[str, Manifest] = {}
        for name in filter(HANDLE.fullmatch, self._names()):
            try:
                manifest = self._seen.get(name) or read_manifest(self._root / name)
            except SegmentError:
                continue
            if manifest.handle == name:
                found[name] = manifest
        self._seen = found
        return list(found.values())

    def _drop(self, max_bytes: int | None) -> int:
        """Removes the surplus above ``max_bytes``; returns how many went."""
        gone = 0
        for manifest in surplus(self._segments(), self._clock(), max_bytes):
            folder = self._folder(manifest.handle)
            try:
                # Read again: another process may have removed it, and its handle been put anew.
                same = read_manifest(folder) == manifest
            except SegmentError:
                same = False
            gone += same and self._discard(folder, manifest.handle)
            self._seen.pop(manifest.handle, None)
        return gone

    def _abandoned(self, folder: Path) -> bool:
        try:
            # A large file grows for long after the folder itself last changed.
            newest = max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # removed meanwhile
            return False
        return self._clock() - newest > self._grace_s

    def _discard(self, folder: Path, handle: str) -> bool:
        """Removes a folder; False where it is already gone."""
        # Renamed first, so that no reader or late writer meets half a folder.
        hidden = self._root / f".{handle}.{secrets.token_hex(8)}"
        try:
            os.utime(folder)  # or a sweep would take what is being removed for abandoned
            os.rename(folder, hidden)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"{folder} cannot be removed: {error}") from error
        shutil.rmtree(hidden, ignore_errors=True)
        return True
