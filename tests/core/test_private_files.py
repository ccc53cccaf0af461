"""What lies in a state folder is its owner's alone, whatever the umask was."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcguard.commands.keys import new_key
from lcguard.private_files import private_folder, private_log
from lcguard.store import StoreError, open_store


@pytest.fixture(autouse=True)
def loose() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_state_folder_is_its_owners(tmp_path: Path) -> None:
    made, old = tmp_path / "made", tmp_path / "old"
    assert private_folder(made) == ""
    old.mkdir(mode=0o775)
    assert "mode 775" in private_folder(old)
    assert private_folder(old) == ""
    assert mode(made) == mode(old) == 0o700


def test_the_first_key_makes_a_private_folder(tmp_path: Path) -> None:
    new_key(tmp_path / "state" / "keys.yaml", "intake")
    assert mode(tmp_path / "state") == 0o700
    assert {mode(p) for p in (tmp_path / "state").iterdir()} == {0o600}


def test_a_log_is_its_owners_also_where_it_was_not(tmp_path: Path) -> None:
    new, old = tmp_path / "logs" / "new.log", tmp_path / "old.log"
    old.write_bytes(b"before\n")
    old.chmod(0o644)
    for path in (new, old):
        with private_log(path) as log:
            log.write(b"after\n")
        assert mode(path) == 0o600
    assert old.read_bytes() == b"before\nafter\n"
    assert mode(new.parent) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o775, 0o702])
def test_a_store_that_others_may_write_to_is_refused(tmp_path: Path, bits: int) -> None:
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(bits)
    with pytest.raises(StoreError, match=f"mode {bits:o}"):
        open_store(str(root))
    root.chmod(0o755)
    open_store(str(root)).close()
    open_store(str(tmp_path / "own")).close()
    assert mode(tmp_path / "own") == 0o700
