"""The command line as a user meets it: results, and one clear line for a wrong input."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lcguard.agents.nano.load import model_path
from lcguard.cli import main
from lcguard.guards.shipped import guard_folder


def lcguard(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, in this process: importing torch for each would take minutes."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["lcguard", *args])
        patch.setenv("COLUMNS", "200")
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert lcguard("--version", cwd=tmp_path).stdout == f"lcguard {version('lcguard')}\n"
    assert "Guards for the KV caches" in lcguard("--help", cwd=tmp_path).stdout


def test_train_then_explain(tmp_path: Path) -> None:
    done = lcguard(
        "train",
        "gate",
        "--out",
        "run",
        "--set",
        "train.steps=2",
        "--set",
        "train.batch=4",
        "--set",
        "data.train_records=60",
        "--set",
        "data.test_records=20",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "run" / "guard" / "lcguard_config.json").read_text())
    assert card["certificate"]["n_pairs"] == 20
    assert card["certificate"]["vacuous"] is True  # two steps protect nothing, and it says so
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not list((tmp_path / "run").glob("checkpoint*"))
    shown = lcguard("explain", "--guard", "run/guard", "SSN: 912-55-1029.", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "912-55-1029" in shown.stdout


def test_explain_shows_what_the_gate_withholds(tmp_path: Path) -> None:
    text = "The patient's name is Ada Long. SSN: 912-55-1029. The chief complaint is back pain."
    shown = lcguard("explain", "--forbid", "government_id", text, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "forbidden: government_id" in shown.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("train", "nothing.yaml"), "nothing.yaml"),
        (("train", "gate", "--set", "train.stepz=3"), "stepz"),
        (("train", "gate", "--set", "train.guard=identity"), "nothing to train"),
        (("train", "gate", "--set", "train.options={wide: 3}"), "wide"),
        (("train", "gate", "--set", "data.source=agentleak", "--data", "nowhere"), "nowhere"),
        (("train", "gate", "--set", "model=./no-such-folder"), "no-such-folder"),
        (("eval", "run", "unknown-preset"), "unknown-preset"),
        (("eval", "run", "demo", "--set", "seeds=[]"), "seeds"),
        (("explain", "--forbid", "salary", "x"), "salary"),
        (("explain", "--guard", "nano:none", "x"), "none"),
    ],
)
def test_wrong_input(args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    line = one_line(lcguard(*args, cwd=tmp_path))
    assert says in line
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_guard_of_another_model(tmp_path: Path) -> None:
    """The card binds the guard to one set of weights."""
    other = tmp_path / "other"
    shutil.copytree(model_path(), other)
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    guard = guard_folder("nano:gate")
    line = one_line(lcguard("explain", "--model", str(other), "--guard", guard, "x", cwd=tmp_path))
    assert "model" in line
    assert "train a guard" in line


def test_policy_commands(tmp_path: Path) -> None:
    good = tmp_path / "policy.yaml"
    good.write_text("version: 1\nedges:\n  - {source: a, audience: b, forbid: [health]}\n")
    assert lcguard("policy", "check", str(good), cwd=tmp_path).returncode == 0
    good.write_text("version: 1\nedges:\n  - {source: a, audience: b, forbids: [health]}\n")
    assert "forbids" in one_line(lcguard("policy", "check", str(good), cwd=tmp_path))
    schema = lcguard("policy", "schema", cwd=tmp_path)
    assert json.loads(schema.stdout)["type"] == "object"
    schema = lcguard("eval", "schema", cwd=tmp_path)
    assert "results" in json.loads(schema.stdout)["properties"]


def test_as_a_process(tmp_path: Path) -> None:
    """The exit code and the one line reach a shell."""
    command = [sys.executable, "-m", "lcguard.cli", "eval", "run", "unknown-preset"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown-preset" in one_line(done)
