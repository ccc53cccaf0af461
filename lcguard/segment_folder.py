"""The folder of a segment: written whole or not at all, read through a memory map.

``segment.safetensors`` holds the tensors ``keys`` and ``values``, ``manifest.json`` the signed
manifest. A folder is immutable: it is never overwritten. Nothing here verifies; ``KVSegment`` does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcguard.manifest import Manifest, SegmentError

TENSOR_FILE = "segment.safetensors"
MANIFEST_FILE = "manifest.json"


def write_folder(target: Path, keys: Tensor, values: Tensor, manifest: Manifest) -> None:
    """Makes ``target``, readable by its owner only.

    Raises:
        SegmentError: it exists.
        OSError: the disk refuses. Nothing is left behind in either case.
    """
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Same parent, so that the final rename stays on one filesystem and is atomic.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tensors = {"keys": keys, "values": values}
        save_file(
            {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, work / TENSOR_FILE
        )
        (work / MANIFEST_FILE).write_bytes(manifest.encode())
        for path in (work / TENSOR_FILE, work / MANIFEST_FILE, work):
            _flush(path)
        try:
            os.rename(work, target)
        except OSError:
            # A rival may have made the folder meanwhile: rename never replaces one with content.
            _refuse_existing(target)
            raise
        _flush(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, not yet verified. Raises ``SegmentError`` for a missing or malformed one."""
    try:
        data = (folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise SegmentError(f"{folder.name}: {MANIFEST_FILE} is unreadable: {error}") from error
    return Manifest.decode(data)


def map_tensors(folder: Path) -> tuple[Tensor, Tensor]:
    """Keys and values as a memory map of the file, not yet verified.

    Raises:
        SegmentError: a missing, truncated or malformed file, or other tensors than these two.
    """
    try:
        with safe_open(folder / TENSOR_FILE, framework="pt", device="cpu") as file:
            if (names := sorted(file.keys())) != ["keys", "values"]:
                raise SegmentError(f"tensors: found {names}, expected ['keys', 'values']")
            return file.get_tensor("keys"), file.get_tensor("values")
    except (OSError, SafetensorError) as error:
        raise SegmentError(f"{folder.name}: {TENSOR_FILE} is unreadable: {error}") from error


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise SegmentError(f"{target.name} exists: segments are immutable, give a new name")


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
