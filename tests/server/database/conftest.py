"""Where the tests' SQLite database is."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state #1?.sqlite"  # characters that mean something in a URI
