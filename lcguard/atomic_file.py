"""Puts a whole file in place of another: a reader finds the old one or the new one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
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
