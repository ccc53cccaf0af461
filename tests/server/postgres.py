"""A PostgreSQL server of the tests' own, from Debian's package ``postgresql``.

It is started by ``tests/server/databases.py``.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from lcguard.server.database.place import PASSWORD_VARIABLE

_FAST = ("fsync=off", "full_page_writes=off", "max_wal_senders=0", "wal_level=minimal")
"""No test cuts the power."""


@dataclass
class Server:
    """A server of its own, on loopback, with a password."""

    binaries: Path
    folder: Path
    user: str | None
    """Whom it runs as; None: whoever runs the tests."""
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Also after ``stop``, with what was there."""
        flags = [word for fast in _FAST for word in ("-c", fast)]
        with (self.folder / "log").open("ab") as log:
            self.process = self._spawn(
                *("postgres", "-D", str(self.folder / "data"), "-h", "127.0.0.1"),
                *("-p", str(self.port), "-k", str(self.folder), *flags),
                log=log,
            )
        until = time.monotonic() + 60
        while True:
            with suppress(psycopg.OperationalError):
                return self.connect().close()
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.05)

    def make(self) -> None:
        (self.folder / "password").write_text(os.environ[PASSWORD_VARIABLE])
        (self.folder / "password").chmod(0o644)
        done = self._spawn(
            *("initdb", "-D", str(self.folder / "data"), "-U", "lcguard", "--no-sync"),
            *("-A", "scram-sha-256", "--pwfile", str(self.folder / "password")),
            *("-E", "UTF8", "--locale", "C.UTF-8"),
        )
        assert done.wait(60) == 0

    def stop(self) -> None:
        """As when it is restarted: whoever is connected loses the connection."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
            self.process = None

    def url(self, schema: str = "public") -> str:
        """Of one schema; the password is in the environment."""
        return (
            f"postgresql://lcguard@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{schema}"
        )

    def empty(self) -> str:
        """The address of a place with nothing in it."""
        name = f"s{secrets.token_hex(8)}"
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return self.url(name)

    def connect(self, url: str = "") -> psycopg.Connection[Any]:
        """Around the code under test; each statement is a transaction."""
        password = os.environ[PASSWORD_VARIABLE]
        return psycopg.connect(url or self.url(), password=password, autocommit=True)

    def _spawn(self, program: str, *args: str, log: object = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(self.binaries / program), *args],
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.DEVNULL,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            user=self.user,
            group=self.user and pwd.getpwnam(self.user).pw_gid,
            extra_groups=None if self.user is None else [],
        )


def found_binaries() -> Path:
    """The newest release's. Skips the test where there is none."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    whole = [p for p in folders if (p / "initdb").exists()]
    if not whole and (there := shutil.which("initdb")):
        whole = [Path(there).resolve().parent]
    if not whole:
        pytest.skip("no PostgreSQL server: install Debian's package postgresql")
    return whole[-1]
