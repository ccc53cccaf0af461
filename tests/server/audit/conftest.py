"""Fixtures of the audit's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.server.audit.trails import write


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "original.sqlite"
    write(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A trail of five rows, cleanly closed."""
    return Path(shutil.copy(original, tmp_path / "audit.sqlite"))
