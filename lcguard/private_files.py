"""Folders and logs that only their owner may use, whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_to_others(path: Path) -> str:
    """Who else may use a file or folder, and the fix; empty where only its owner may."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return ""
    may = "written to" if mode & 0o022 else "read"
    wanted = "700" if path.is_dir() else "600"
    return f"{path} may be {may} by others (mode {mode:o}): chmod {wanted} {path}"


def private_folder(path: Path) -> str:
    """Makes a folder that others can neither enter nor list, or makes one that exists such.

    Returns a line on what was changed; empty for nothing.

    Raises:
        ValueError: one that others may write to, and that is not ours to change.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if not (open_now := open_to_others(path)):
        return ""
    try:
        path.chmod(mode & 0o700)
    except OSError:
        if mode & 0o022:
            raise ValueError(open_now) from None
        return open_now
    return f"{path} was open to others (mode {mode:o}): it is its owner's now"


def private_log(path: Path) -> BinaryIO:
    """Opens a log to append to, readable by its owner alone, also one that was not."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
    os.fchmod(log.fileno(), 0o600)
    return log
