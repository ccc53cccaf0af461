"""The databases that the server's tests run on: a file of SQLite, and a server of PostgreSQL.

A pytest plugin (``pytest_plugins = ("tests.server.databases",)``): fixture ``where`` runs a test on
both, and skips the second where Debian's package ``postgresql`` is not installed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcguard.commands.live_servers import free_port
from lcguard.server.database.place import PASSWORD_VARIABLE
from tests.server.postgres import Server, found_binaries


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One for all tests; each has a schema of its own."""
    binaries = found_binaries()
    user = None if os.getuid() else "postgres"  # it refuses to run as root
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="lcguard-postgres-") as name,
    ):
        patch.setenv(PASSWORD_VARIABLE, secrets.token_urlsafe(16))
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        server = Server(binaries, folder, user, free_port())
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """An empty place of either kind."""
    if request.param == "sqlite":
        return tmp_path / "lcguard.sqlite"
    server: Server = request.getfixturevalue("postgres")
    return server.empty()
