"""``scripts/gpu_day.sh``: what it would do on a GPU, tried in small on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script of bash and timeout")


def day(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/gpu_day.sh", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_it_lists_its_steps_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    listed = day("--list").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert names == ["parity", "kernel", "agent", "publish", "receive", "detector", "gate"]
    assert "4096 16384 32768 65536 131072" in listed[3]
    assert "benchmarks/results/gpu/kernel.json" in listed[1]
    assert len(day("--list", "--only", "gate").stdout.splitlines()) == 1
    refused = day("--only", "kernels", "--cpu", "--out", tmp_path)
    assert refused.returncode == 2
    assert "--only kernels is no step: use parity kernel" in refused.stderr
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    without = day("--out", tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert without.returncode == 2
    assert "no GPU here" in without.stderr
    assert not (tmp_path / "out").exists()


def test_a_step_that_ran_into_its_limit_is_run_again_and_one_that_is_done_is_not(
    tmp_path: Path,
) -> None:
    stopped = day("--cpu", "--out", tmp_path, "--only", "kernel", "--limit", "0.01")
    assert stopped.returncode == 1
    assert "stopped at its limit of 0.01 s" in (tmp_path / "summary.txt").read_text()
    again = day("--cpu", "--out", tmp_path, "--only", "kernel")
    assert again.returncode == 0, (tmp_path / "kernel.log").read_text()
    assert {r["guard"] for r in read(tmp_path / "kernel.json")["rows"]} >= {"gate", "residual"}
    log = (tmp_path / "kernel.log").read_text()
    assert log.startswith("device: no GPU")
    assert "\ncommand: " in log
    assert "kernel: done before" in day("--cpu", "--out", tmp_path, "--only", "kernel").stdout
    assert (tmp_path / "kernel.log").read_text() == log


@pytest.mark.slow
@pytest.mark.vllm
def test_every_other_step_runs(tmp_path: Path) -> None:
    """But for parity, which is a file of tests of its own."""
    pytest.importorskip("vllm")
    done = day("--cpu", "--out", tmp_path, "--only", "agent,publish,receive,detector,gate")
    assert done.returncode == 0, "".join(p.read_text() for p in tmp_path.glob("*.log"))
    for name in ("publish", "handoff"):
        assert [r["tokens"] for r in read(tmp_path / f"{name}.json")["rows"]] == [64, 128]
    assert read(tmp_path / "train-gate.json")["seconds"] > 0
    assert read(tmp_path / "train-detector.json")
