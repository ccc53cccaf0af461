"""What an engine would refuse is said in one line before vLLM is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lcguard.agents.nano.load import model_path
from lcguard.guards import FrozenGuard
from lcguard.guards.shipped import guard_folder
from lcguard.handoff.keys import KEY_VARIABLE, new_key
from lcguard.vllm import llm
from lcguard.vllm.llm import GuardedLLM
from lcguard.vllm.preflight import check_start
from tests.engine import needs_vllm


def model_of_others(folder: Path) -> str:
    """The nano agent with one weight moved: another model."""
    shutil.copytree(model_path(), folder)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without_tokenizer(folder: Path) -> str:
    shutil.copytree(model_path(), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


def altered_guard(folder: Path) -> str:
    shutil.copytree(guard_folder("nano:gate"), folder)
    weights = folder / "guard.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    return str(folder)


def unproven_guard(folder: Path) -> str:
    """As three steps of training leave one."""
    card = {"mean_nats": 799_448.0, "vacuous": True}
    gate = FrozenGuard.from_pretrained("nano:gate")
    gate.with_card(evaluation=None, certificate=card).save_pretrained(folder)
    return str(folder)


def wrong_start(name: str, folder: Path) -> tuple[str, dict[str, str], str]:
    """Model, guards, and what is said."""
    nano = str(model_path())
    made = {
        "another model's guard": lambda: (
            model_of_others(folder / "m"),
            {"gate": "nano:gate"},
            "guards.gate: guard 'gate' in gate was made for model weights",
        ),
        "altered guard": lambda: (
            nano,
            {"gate": altered_guard(folder / "g")},
            "altered or cut",
        ),
        "mistyped guard": lambda: (nano, {"gate": "nano:gat"}, "did you mean 'nano:gate'?"),
        "unproven guard": lambda: (
            nano,
            {"mine": unproven_guard(folder / "g")},
            "guards.mine: nothing shows that it withholds anything: its certificate of 7.994e+05 "
            "nats is vacuous",
        ),
        "no tokenizer": lambda: (without_tokenizer(folder / "m"), {}, "has no tokenizer"),
        "twin that nobody can make": lambda: (nano, {"x": "./nowhere"}, "is not a folder"),
    }
    return made[name]()


WRONG = (
    "another model's guard",
    "altered guard",
    "unproven guard",
    "mistyped guard",
    "no tokenizer",
    "twin that nobody can make",
)


@pytest.mark.parametrize("name", WRONG)
def test_it_is_said_before_vllm_is_started(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def started(**options: Any) -> Any:
        raise AssertionError("vLLM was started")

    monkeypatch.setenv(KEY_VARIABLE, new_key())
    monkeypatch.setattr(GuardedLLM, "_start", staticmethod(started))
    model, guards, said = wrong_start(name, tmp_path)
    with pytest.raises(ValueError, match=r"^.+$") as caught:  # one line
        GuardedLLM.build(model, guards=guards)
    assert said in str(caught.value)
    assert capfd.readouterr().err == ""


def test_an_unproven_guard_is_served_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def started(*settings: Any) -> Any:
        raise Started  # past all checks, and vLLM not imported yet

    monkeypatch.setenv(KEY_VARIABLE, new_key())
    monkeypatch.setattr(llm, "transfer_config", started)
    guards = {"mine": unproven_guard(tmp_path / "g")}
    with pytest.raises(Started):
        GuardedLLM.build(str(model_path()), guards=guards, unproven=["mine"])


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, said in (("", "is not set"), ("xyz", "is not hexadecimal")):
        monkeypatch.setenv(KEY_VARIABLE, text)
        with pytest.raises(ValueError, match=f"{KEY_VARIABLE} {said}"):
            check_start(str(model_path()), {})


def test_a_policy_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, new_key())
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        GuardedLLM.build(str(model_path()), policy=tmp_path / "absent.yaml")


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, new_key())
    check_start(str(model_path()), {"gate": "nano:gate"})


@needs_vllm
@pytest.mark.vllm
def test_vllms_own_server_says_it_before_an_engine_starts(tmp_path: Path) -> None:
    """vLLM alone wraps the connector's reason into 250 lines that end with another one."""
    extra = {"store": f"file://{tmp_path}/segments", "guards": {"gate": "nano:gate"}}
    transfer = {
        "kv_connector": "LCGuardConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_path()), "--dtype", "float32", "--max-model-len", "1024"),
        *("--host", "127.0.0.1", "--kv-transfer-config", json.dumps(transfer)),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop(KEY_VARIABLE, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"lcguard: {KEY_VARIABLE} is not set: set it to the output of ")
    assert "Traceback" not in "".join(before)
    assert "EngineCore" not in done.stdout + done.stderr
