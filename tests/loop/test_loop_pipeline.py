"""The Kubeflow pipeline: its commands are the command line's, and the file is what compiles."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.loop_config import LoopConfig
from lcguard.config import dump_config
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.registry import Registry
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageMeter
from tests.paths import ROOT

FILE = ROOT / "container" / "loop_pipeline.yaml"
PIPELINE, PLATFORM = yaml.safe_load_all(FILE.read_text())
STEPS = ("collect", "train", "judge", "promote")
KFP = ROOT / "build" / "kfp" / "bin" / "python"


def command(step: str, **inputs: str) -> list[str]:
    """A step's command line, as the pipeline's launcher fills it in."""
    made = PIPELINE["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    assert made["command"] == ["lcguard"]

    def filled(text: str) -> str:
        for name, value in inputs.items():
            text = text.replace(f"{{{{$.inputs.parameters['{name}']}}}}", value)
        return text

    def word(text: str) -> str:
        if text.startswith("{"):
            parts: dict[str, Any] = json.loads(text) if '"Concat"' in text else {"Concat": [text]}
            return "".join(filled(p) for p in parts["Concat"])
        return filled(text)

    return [word(text) for text in made["args"]]


def test_the_steps_run_one_after_the_other_on_the_deployments_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a deployment in which nothing leaks: each does what little there is to do."""
    monkeypatch.setenv(KEY_VARIABLE, "ab" * 32)
    (tmp_path / "loop.yaml").write_text(dump_config(LoopConfig()))
    meter = LeakageMeter(Database(tmp_path / "lcguard.sqlite"), 0.2, 3600)
    meter.record_error(("a", "b", "c"), "no engine")
    begun = CliRunner().invoke(app, ["loop", "init", "nano:gate", "--dir", str(tmp_path)])
    assert begun.exit_code == 0, begun.output
    said = []
    for step in STEPS:
        words = command(step, round_name="r1", config=f"{tmp_path}/loop.yaml")
        words = [w.replace("/state", str(tmp_path)) if w.startswith("/state") else w for w in words]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        said.append(done.output.strip().splitlines()[-1])
    assert said == [
        "no leak; 0 records to learn from",
        "nothing to learn",
        "nothing to judge",
        "nothing to promote",
    ]
    assert (tmp_path / "rounds" / "r1" / "leak.json").exists()
    assert Registry(tmp_path / "guards", bytes.fromhex("ab" * 32)).state.live == "v1"


def test_each_step_waits_for_the_one_before_and_is_never_taken_from_a_cache() -> None:
    tasks = PIPELINE["root"]["dag"]["tasks"]
    assert set(tasks) == set(STEPS)
    for before, step in zip((None, *STEPS), STEPS, strict=False):
        assert tasks[step].get("dependentTasks", []) == ([before] if before else [])
        assert not tasks[step].get("cachingOptions")
    for step in STEPS:
        (made,) = PLATFORM["platforms"]["kubernetes"]["deploymentSpec"]["executors"][
            f"exec-{step}"
        ]["pvcMount"]
        assert made["mountPath"] == "/state"


@pytest.mark.skipif(not KFP.exists(), reason="kfp is not there: make pipeline")
def test_the_file_is_what_compiles(tmp_path: Path) -> None:
    out = tmp_path / "pipeline.yaml"
    script = str(ROOT / "scripts" / "loop_pipeline.py")
    subprocess.run([str(KFP), script, str(out)], check=True, capture_output=True)
    assert out.read_text() == FILE.read_text()
