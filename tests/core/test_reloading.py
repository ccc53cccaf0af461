"""A file that is followed: read again when it changes, and never given up for a broken one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lcguard.reloading import ReloadingFile


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def number(path: Path) -> int:
    return int(path.read_text())


def put(path: Path, text: str) -> None:
    """As an editor saves: another file under the same name."""
    work = path.with_suffix(".new")
    work.write_text(text)
    work.replace(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def test_a_change_is_seen_once_the_interval_is_over(file: Path) -> None:
    clock = Clock()
    followed = ReloadingFile(file, number, every_s=2, clock=clock)
    put(file, "2")
    clock.now = 1.9
    assert followed.current() == 1
    clock.now = 2.0
    assert followed.current() == 2
    assert followed.loads == 2


def test_an_unchanged_file_is_not_read_again(file: Path) -> None:
    clock, reads = Clock(), []
    followed = ReloadingFile(file, lambda p: reads.append(p) or number(p), every_s=1, clock=clock)
    for clock.now in range(1, 50):
        assert followed.current() == 1
    assert len(reads) == 1


@pytest.mark.parametrize("text", ["", "none", "12x"])
def test_a_broken_file_leaves_the_last_good_content_and_says_why(file: Path, text: str) -> None:
    clock = Clock()
    followed = ReloadingFile(file, number, every_s=1, clock=clock)
    put(file, text)
    clock.now = 5
    assert followed.current() == 1
    assert "invalid literal" in followed.error
    put(file, "3")
    clock.now = 10
    assert followed.current() == 3
    assert followed.error == ""


def test_a_removed_file_leaves_the_last_good_content(file: Path) -> None:
    clock = Clock()
    followed = ReloadingFile(file, number, every_s=1, clock=clock)
    file.unlink()
    clock.now = 5
    assert followed.current() == 1
    assert "No such file" in followed.error
    file.write_text("4")
    clock.now = 10
    assert followed.current() == 4
    assert followed.error == ""


def test_the_old_file_put_back_is_no_error_any_more(file: Path) -> None:
    """A rename brings back the same inode, size and time: nothing changed since it was read."""
    clock = Clock()
    followed = ReloadingFile(file, number, every_s=1, clock=clock)
    kept = file.with_suffix(".kept")
    os.rename(file, kept)
    file.write_text("broken")
    clock.now = 5
    assert followed.current() == 1
    assert followed.error
    os.rename(kept, file)
    clock.now = 10
    assert followed.current() == 1
    assert followed.error == ""


def test_same_size_and_time_under_another_inode_is_a_change(file: Path) -> None:
    clock = Clock()
    followed = ReloadingFile(file, number, every_s=1, clock=clock)
    before = file.stat()
    put(file, "7")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now = 5
    assert followed.current() == 7


@pytest.mark.parametrize("text", [None, "none"])
def test_nothing_starts_on_a_file_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "number"
    if text is not None:
        path.write_text(text)
    with pytest.raises((OSError, ValueError)):
        ReloadingFile(path, number)


def test_another_error_of_the_parser_is_not_swallowed(file: Path) -> None:
    """A mistake of the program is none of the file's author."""
    clock = Clock()

    def parse(path: Path) -> int:
        if path.read_text() == "2":
            raise KeyError("bug")
        return 1

    followed = ReloadingFile(file, parse, every_s=1, clock=clock)
    put(file, "2")
    clock.now = 5
    with pytest.raises(KeyError):
        followed.current()


def test_while_one_thread_reads_the_others_get_the_content_in_force(file: Path) -> None:
    clock, inside, leave = Clock(), threading.Event(), threading.Event()

    def parse(path: Path) -> int:
        if path.read_text() == "2":
            inside.set()
            assert leave.wait(60)
        return number(path)

    followed = ReloadingFile(file, parse, every_s=1, clock=clock)
    put(file, "2")
    clock.now = 5
    reader = threading.Thread(target=followed.current)
    reader.start()
    assert inside.wait(60)
    assert followed.current() == 1  # at once: `leave` is not set
    leave.set()
    reader.join(60)
    assert followed.current() == 2


def test_a_file_that_is_not_there_yet_is_taken_when_it_appears(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "later"
    followed = ReloadingFile(path, number, clock=clock, absent=-1)
    assert (followed.current(), followed.loads, followed.error) == (-1, 0, "")
    clock.now += 2
    assert followed.current() == -1
    put(path, "seven")  # not a number: what held goes on holding
    clock.now += 2
    assert followed.current() == -1
    assert followed.error
    put(path, "7")
    clock.now += 2
    assert (followed.current(), followed.loads, followed.error) == (7, 1, "")
    path.unlink()  # from now on it is missed
    clock.now += 2
    assert followed.current() == 7
    assert followed.error


@pytest.mark.parametrize("there", ["a folder", "a broken link", "no number"])
def test_what_is_there_and_cannot_be_read_is_not_absent(tmp_path: Path, there: str) -> None:
    path = tmp_path / "file"
    if there == "a folder":
        path.mkdir()
    elif there == "a broken link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text(there)
    with pytest.raises((ValueError, OSError)):
        ReloadingFile(path, number, clock=Clock(), absent=-1)
