"""Ctrl-C, and what the kernel ends: one line, and how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcguard.commands.inventory import count_units
from tests.evaluation.test_eval_tool import TINY as EVALUATION
from tests.test_cli import TINY


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_attacks_of_an_evaluation(tmp_path: Path) -> None:
    """Sent to the command alone, while its forked fits would run for hours."""
    (tmp_path / "long.yaml").write_text(
        "title: long\nmodel: nano\nseeds: [0]\n"
        "data: {source: generator, train_records: 64, test_records: 16}\n"
        "guards: [{name: redact, guard: redact}]\n"
        "attacks: [{name: probe, attack: probe, options: {fit: {steps: 100000000}}}]\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lcguard.cli", "eval", "run", "long.yaml", "--out", "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "lcguard: stopped; resume with: lcguard eval resume run"
    assert "Traceback" not in said


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["train", "gate", "--out", "run", "--set", "train.checkpoint_every=1", *TINY]
    words += ["--set", "train.steps=10000"]
    # what Python does at its end would take seconds, with all that a training has loaded
    taken_apart = "import atexit, sys; atexit.register(print, 'taken apart'); "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{taken_apart}from lcguard.cli import main; main()", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"lcguard: stopped; resume with: lcguard {' '.join(words)}"
    assert "Traceback" not in said
    assert "taken apart" not in out


START = """
import os, signal, time
from contextlib import suppress
from lcguard.commands.script import resumable
from lcguard.evaluation.parallel import side_by_side

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

with resumable("lcguard eval resume run"):
"""


def ended(within: str) -> tuple[int, str]:
    """Exit code and errors of a process of its own: where a signal comes in a callback of a fork,
    logging's lock stays taken, and all tests after it would wait for that."""
    done = subprocess.run([sys.executable, "-c", START + within], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_ctrl_c_where_python_drops_an_exception() -> None:
    """As in what runs at a fork; nobody would press it again."""
    code, said = ended("    Interrupted()\n    list(side_by_side([lambda: time.sleep(3600)]))")
    assert code == 130
    assert "lcguard: stopped; resume with: lcguard eval resume run" in said


def test_ctrl_c_is_no_lack_of_memory() -> None:
    """Where the processes that it ends are noticed first."""
    code, said = ended(
        "    with suppress(KeyboardInterrupt):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    list(side_by_side([killed]))"
    )
    assert code == 130
    assert "lcguard: stopped; resume with: lcguard eval resume run" in said


def test_a_fit_that_the_kernel_kills_ends_the_run_in_one_line() -> None:
    """As Linux does where memory is full."""
    code, said = ended("    list(side_by_side([killed, killed]))")
    assert code == 1
    (said,) = said.splitlines()
    assert "a process of this run was killed, most likely because memory was full" in said
    assert said.endswith("resume with: lcguard eval resume run")


INTERRUPTED = """
import os, signal, sys
from lcguard.cli import main
from lcguard.evaluation.outcomes import Journal

write, written = Journal.write, []

def interrupted_before_the_third(self, *args, **more):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    write(self, *args, **more)
    written.append(1)

Journal.write = interrupted_before_the_third
sys.argv[0] = "lcguard"
sys.exit(main())
"""


def test_nothing_more_is_done_after_ctrl_c(tmp_path: Path) -> None:
    """Not even the unit whose figures are there already is written."""
    (tmp_path / "tiny.yaml").write_text(EVALUATION)
    out = tmp_path / "stopped"
    command = [sys.executable, "-c", INTERRUPTED, "eval", "run", "tiny.yaml", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert (
        done.stderr.splitlines()[-1] == f"lcguard: stopped; resume with: lcguard eval resume {out}"
    )
    assert count_units(out / "attempts.jsonl") == 2
    assert not (out / "report.json").exists()
