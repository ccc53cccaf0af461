"""The command line as a user meets it: results, and one clear line for a wrong input."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
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
    assert "batch 4: about 0." in done.stderr
    assert "GiB of memory, and " in done.stderr
    said = done.stdout.splitlines()
    assert len(said) <= 8
    assert any(x.startswith("one secret: named by no attacker more often than") for x in said)
    assert any(x.startswith("verdict: unproven: its certificate of ") for x in said), done.stdout
    assert said[-1] == "all figures: run/summary.json"
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


# -- what the machine lacks, and what was mistyped


def without_tokenizer(folder: Path) -> str:
    shutil.copytree(model_path(), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


@pytest.mark.parametrize("command", [("train", "gate"), ("eval", "run", "demo"), ("demo",)])
def test_a_device_that_is_not_there(command: tuple[str, ...], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = lcguard(*command, "--device", "cuda", cwd=tmp_path)
    assert one_line(done).startswith("lcguard: device 'cuda' cannot be used (")
    assert one_line(done).endswith("): use cpu: torch finds no CUDA device")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_nothing_is_called(tmp_path: Path) -> None:
    assert "device 'gpu' cannot be used" in one_line(
        lcguard("train", "gate", "--device", "gpu", cwd=tmp_path)
    )


@pytest.mark.parametrize("command", [("train", "gate", "--set"), ("probe", "--model")])
def test_a_model_without_tokenizer(command: tuple[str, ...], tmp_path: Path) -> None:
    folder = without_tokenizer(tmp_path / "m")
    given = folder if command[0] == "probe" else f"model={folder}"
    done = lcguard(*command, given, cwd=tmp_path)
    assert f"{folder} has no tokenizer that can be read" in one_line(done)
    assert "put tokenizer.json, or tokenizer.model" in one_line(done)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        ("train", "gate"),
        ("eval", "run", "demo"),
        ("detect", "eval", "--out", "x", "--source", "generator"),
    ],
)
def test_data_that_no_source_asked_for_must_exist(command: tuple[str, ...], tmp_path: Path) -> None:
    done = lcguard(*command, "--data", "nowhere", cwd=tmp_path)
    assert one_line(done) == (
        "lcguard: --data nowhere does not exist: give a folder or file, or leave it out"
    )
    assert done.returncode == 2


DETECT = ("detect", "eval", "--out", "x", "--source")
PERSON = "did you mean 'person'?"
RECORD = {
    "text": "Ada Long complains.",
    "spans": [{"start": 0, "end": 8, "category": "persn"}],
    "questions": [{"question": "Who?", "answer": "Ada"}],
}


@pytest.mark.parametrize(
    ("says", "commands"),
    [
        (
            "model 'nanoo' is unknown: did you mean 'nano'?",
            [
                ("train", "gate", "--set", "model=nanoo"),
                ("eval", "run", "demo", "--set", "model=nanoo"),
                ("explain", "--model", "nanoo", "x"),
                ("probe", "--model", "nanoo"),
                ("models", "prepare", "nanoo"),
            ],
        ),
        (
            "model './nano' is not a folder; give a model folder or a hub repository",
            [("train", "gate", "--set", "model=./nano"), ("probe", "--model", "./nano")],
        ),
        (
            "guard 'nano:gat' is unknown: did you mean 'nano:gate'?",
            [
                ("explain", "--guard", "nano:gat", "x"),
                ("train", "gate", "--set", "init=nano:gat"),
                (*DETECT, "generator", "--model", "nano", "--guard", "nano:gat"),
            ],
        ),
        (
            PERSON,
            [
                ("explain", "--forbid", "persn", "x"),
                ("policy", "check", "policy.yaml"),
                ("train", "gate", "--set", "data.source=jsonl", "--data", "records.jsonl"),
            ],
        ),
        (
            "did you mean 'generator'?",
            [
                ("train", "gate", "--set", "data.source=generatr"),
                (*DETECT, "generatr"),
            ],
        ),
    ],
)
def test_one_slip_is_said_alike_everywhere(
    says: str, commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    policy = "version: 1\nedges: [{source: a, audience: b, forbid: [persn]}]\n"
    (tmp_path / "policy.yaml").write_text(policy)
    (tmp_path / "records.jsonl").write_text(json.dumps(RECORD) + "\n")
    for command in commands:
        done = lcguard(*command, cwd=tmp_path)
        assert one_line(done).endswith(says), command
        assert done.returncode == 2


def test_the_guard_to_go_on_from_is_made_first(tmp_path: Path) -> None:
    done = lcguard("train", "gate-finish", cwd=tmp_path)
    assert one_line(done) == (
        "lcguard: init 'runs/gate/guard' is not there: make it first with "
        "`lcguard train gate --out runs/gate`"
    )


def test_explain_says_what_is_withheld_where_there_is_no_colour(tmp_path: Path) -> None:
    text = "The patient's name is Ada Long. SSN: 912-55-1029. The chief complaint is back pain."
    shown = lcguard("explain", "--forbid", "government_id", text, cwd=tmp_path).stdout
    marked = re.findall(r"\[([^|]*)\|(\d+)%\]", shown)
    hidden = "".join(text for text, share in marked if int(share) >= 50)
    assert "912" in hidden, shown
    assert "back pain" not in hidden, shown
    for nothing in ("", "none"):
        shown = lcguard("explain", "--forbid", nothing, text, cwd=tmp_path).stdout
        assert "forbidden: nothing; 100% of the entries pass" in shown
        assert text in shown


TINY = ("--set", "train.steps=2", "--set", "train.batch=2", "--set", "train.label_steps=0")
TINY += ("--set", "data.train_records=40", "--set", "data.test_records=20")


@contextlib.contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """No file grows beyond it: writing fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_training_in_one_line_and_it_goes_on_later(tmp_path: Path) -> None:
    words = ("train", "gate", "--out", "run", *TINY)
    with files_of_at_most(200_000):  # less than a checkpoint
        done = lcguard(*words, cwd=tmp_path)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("lcguard: [Errno 27] File too large"), done.stderr
    assert line.endswith("make room and run the same command again; what was done is kept")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert lcguard(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "guard" / "guard.safetensors").is_file()
    # and into what is finished no other training goes
    other = lcguard(*words, "--set", "train.seed=7", cwd=tmp_path)
    assert one_line(other).startswith(
        "lcguard: run holds a run with another configuration: train.seed is 0 there and 7 here; "
        "go on with `lcguard train run/config.yaml --out run`"
    )
    assert other.returncode == 2
