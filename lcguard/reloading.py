"""A file that is read again whenever it changes, and whose last good content holds if it breaks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """What ``parse`` makes of ``path``, at most ``every_s`` old.

    The first reading raises whatever ``parse`` does: nothing starts on a broken file. With
    ``absent`` a file that is not there yet is none: that content holds until it appears. A later
    reading that raises ``ValueError`` or ``OSError`` leaves the last good content in force and its
    reason in ``error``: a slip in an editor must neither open nor close a running deployment.
    """

    def __init__(
        self,
        path: str | Path,
        parse: Callable[[Path], T],
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        absent: T | None = None,
    ) -> None:
        self.path, self._parse, self._every_s, self._clock = Path(path), parse, every_s, clock
        self._lock = threading.Lock()
        self._mark = self._stat()
        missing = self._mark is None and absent is not None and not os.path.lexists(self.path)
        self._value: T = absent if missing and absent is not None else parse(self.path)
        self._next_s = clock() + every_s
        self.error = ""
        """Why the file as it is now cannot be used; empty while it can."""
        self.loads = 0 if missing else 1
        """Contents taken so far."""

    def current(self) -> T:
        """The content in force."""
        if self._clock() >= self._next_s and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._value

    def _look(self) -> None:
        self._next_s = self._clock() + self._every_s
        mark = self._stat()
        if mark == self._mark:
            self.error = ""  # the very file that was read is back in its place
            return
        try:
            self._value = self._parse(self.path)
        except (ValueError, OSError) as error:
            self.error = " ".join(str(error).split())
        else:
            self.error = ""
            self.loads += 1
            # taken before reading: a change in between is seen at the next look, and a file that
            # could not be used is tried again
            self._mark = mark

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def in_force(value: T | ReloadingFile[T]) -> T:
    """The content of a file that is followed, or what never changes."""
    return value.current() if isinstance(value, ReloadingFile) else value
