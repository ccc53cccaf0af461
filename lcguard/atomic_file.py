"""Puts a whole file or folder in place of another: a reader finds the old one or the new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PUBLIC = 0o644
"""Mode of a file that others read."""


def replace_file(path: Path, data: bytes, *, keep_owner: bool = False, mode: int = 0o600) -> None:
    """Writes ``path`` whole and durably, readable by its owner alone unless ``mode`` says
    otherwise, or leaves it as it was.

    ``keep_owner``: a file that exists stays its owner's, whoever writes. Raises ``OSError``.
    """
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if keep_owner and path.exists():
                owner = path.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, its owner's alone, that takes the place of ``folder`` when the block ends.
    Where the block raises, what was there stays. Raises ``OSError``."""
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = part.with_name(part.name + "-old")
    try:
        yield part
        if target.exists():
            os.replace(target, old)
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
