"""The Kubeflow pipeline: kfp's own local runner runs it, and the file is what compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lcguard.agents.scenarios.jsonl_writer import jsonl_of
from lcguard.agents.scenarios.load import load_hops
from lcguard.cli import app
from lcguard.commands.loop_collect import collect
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_files import write_step
from lcguard.commands.loop_train import CANDIDATE, TRAINED, Trained
from lcguard.config import dump_config
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.frozen import WEIGHTS
from lcguard.guards.registry import Registry
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageMeter
from tests.paths import ROOT, TESTS

FILE = ROOT / "container" / "loop_pipeline.yaml"
SCRIPT = ROOT / "scripts" / "loop_pipeline.py"
PIPELINE, PLATFORM = yaml.safe_load_all(FILE.read_text())
STEPS = ("collect", "train", "judge", "promote")
KFP = ROOT / "build" / "kfp" / "bin" / "python"
KEY = "ab" * 32
needs_kfp = pytest.mark.skipif(not KFP.exists(), reason="kfp is not there: make kfp")
needs_command = pytest.mark.skipif(
    not (Path(sys.executable).parent / "lcguard").exists(),
    reason="no lcguard command beside this Python: make venv",
)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment's folder, in which nothing leaks."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "loop.yaml").write_text(dump_config(LoopConfig()))
    meter = LeakageMeter(Database(folder / "lcguard.sqlite"), 0.2, 3600)
    meter.record_error(("a", "b", "c"), "no engine")
    begun = CliRunner().invoke(app, ["loop", "init", "nano:gate", "--dir", str(folder)])
    assert begun.exit_code == 0, begun.output
    return folder


def run(state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The round ``r1`` under kfp's local runner, with the command line of this environment."""
    environment = {k: v for k, v in os.environ.items() if k != KEY_VARIABLE}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = [KFP, TESTS / "loop" / "kfp_local.py", SCRIPT, state, "r1", state.parent / "outputs"]
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=environment | variables
    )


def opened(state: Path) -> Registry:
    return Registry(state / "guards", bytes.fromhex(KEY))


@pytest.mark.slow
@needs_kfp
@needs_command
def test_where_nothing_leaks_all_four_steps_end_with_nothing_to_do(state: Path) -> None:
    done = run(state, **{KEY_VARIABLE: KEY})
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = json.loads(done.stdout.splitlines()[-1])
    assert outputs == {"Output": "nothing to promote"}
    said = [
        json.loads(path.read_text())["parameterValues"]["Output"]
        for path in (state.parent / "outputs").rglob("executor_output.json")
    ]
    assert sorted(said) == [
        "no leak; 0 records to learn from",
        "nothing to judge",
        "nothing to learn",
        "nothing to promote",
    ]
    assert (state / "rounds" / "r1" / "leak.json").exists()
    assert opened(state).state.live == "v1"


@pytest.mark.slow
@needs_kfp
@needs_command
def test_a_refused_candidate_ends_the_round(state: Path) -> None:
    """One whose file was damaged after its training: what was done is not done again, and the
    judgement is the command line's own."""
    out, registry = state / "rounds" / "r1", opened(state)
    data = state.parent / "mine.jsonl"
    data.write_text(jsonl_of(load_hops("generator", seed=3, split="coined", n=4)))
    assert collect(LoopConfig(), registry, out, data=data).needed
    live = registry.state.live_version
    folder = out / CANDIDATE / "guard"
    registry.load(live).save_pretrained(folder)
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    trained = Trained(
        digest="d" * 64,
        parent=live.digest,
        run="r" * 64,
        steps=1,
        attacker_steps=1,
        measured_steps=1,
        seconds=1.0,
    )
    write_step(out / TRAINED, trained)
    done = run(state, **{KEY_VARIABLE: KEY})
    assert done.returncode != 0
    assert "refused: " in done.stdout
    assert "altered or cut" in done.stdout
    assert "lcguard loop judge ended with exit code 3" in done.stdout
    assert "taken in" not in done.stdout  # promote did not run
    assert [v.name for v in registry.state.versions] == ["v1"]
    assert not json.loads((out / "judged.json").read_text())["judgement"]["accepted"]


@pytest.mark.slow
@needs_kfp
@needs_command
def test_without_the_deployments_key_no_step_does_anything(state: Path) -> None:
    done = run(state)
    assert done.returncode != 0
    assert KEY_VARIABLE in done.stdout
    assert "lcguard loop collect ended with exit code" in done.stdout
    assert not (state / "rounds").exists()


def test_each_step_waits_for_the_one_before_and_is_never_taken_from_a_cache() -> None:
    tasks = {t["taskInfo"]["name"]: (n, t) for n, t in PIPELINE["root"]["dag"]["tasks"].items()}
    assert set(tasks) == set(STEPS)
    for before, step in zip((None, *STEPS), STEPS, strict=False):
        _, task = tasks[step]
        assert task.get("dependentTasks", []) == ([tasks[before][0]] if before else [])
        assert not task.get("cachingOptions")
        assert task["inputs"]["parameters"]["step"]["runtimeValue"]["constant"] == step


def test_a_pod_has_the_state_and_the_key_and_needs_no_index() -> None:
    executors = PIPELINE["deploymentSpec"]["executors"]
    on = PLATFORM["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(STEPS)
    assert executors.keys() == on.keys()
    for name, made in executors.items():
        (volume,), (secret,) = on[name]["pvcMount"], on[name]["secretAsEnv"]
        assert volume["mountPath"] == "/state"
        assert secret["keyToEnv"] == [{"envVar": KEY_VARIABLE, "secretKey": "key"}]
        assert made["container"]["image"] == "lcguard-loop"
        assert not any("pip" in word for word in made["container"]["command"])


@needs_kfp
def test_the_file_is_what_compiles(tmp_path: Path) -> None:
    out = tmp_path / "pipeline.yaml"
    subprocess.run([str(KFP), str(SCRIPT), str(out)], check=True, capture_output=True)
    assert out.read_text() == FILE.read_text()
