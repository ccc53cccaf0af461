"""A file that is not UTF-8 ends a command in one line that names it, whichever file it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lcguard.agents.nano.load import model_path
from lcguard.cli import main
from lcguard.commands.keys import new_key
from lcguard.guards.shipped import guard_folder
from lcguard.handoff.keys import KEY_VARIABLE

BAD = b"version: 1 \xe9\xff\n"

COMMANDS: dict[str, tuple[str, list[str]]] = {
    "policy": ("policy.yaml", ["policy", "check", "policy.yaml"]),
    "keys": ("keys.yaml", ["keys", "list", "--dir", "."]),
    "keys beside a policy": ("keys.yaml", ["policy", "check", "good.yaml"]),
    "server": ("server.yaml", ["config", "check", "--dir", "."]),
    "deployment key": ("deployment.key", ["serve", "--dir", ".", "--upstream", "http://[::1]:9"]),
    "audit's key": ("deployment.key", ["audit", "verify", "--dir", "."]),
    "evaluation": ("eval.yaml", ["eval", "run", "eval.yaml"]),
    "training": ("train.yaml", ["train", "train.yaml"]),
    "started run": ("run/config.yaml", ["eval", "resume", "run"]),
    "report": ("run/report.json", ["eval", "compare", "run", "run"]),
    "records": (
        "mine.jsonl",
        [
            "eval",
            "run",
            "main",
            "--set",
            "data.source=jsonl",
            "--set",
            "data.path=mine.jsonl",
            "--set",
            "data.records=4",
        ],
    ),
    "guard's card": ("guard/lcguard_config.json", ["explain", "Ann.", "--guard", "guard"]),
    "model's configuration": ("model/config.json", ["explain", "Ann.", "--model", "./model"]),
    "model's tokenizer": ("model/tokenizer.json", ["probe", "--model", "./model"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_file_is_named_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name, command = COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr("sys.argv", ["lcguard", *command])
    new_key(Path("keys.yaml"), "intake")
    Path("good.yaml").write_text("version: 1\nedges: []\n...\n")
    Path("run").mkdir()
    for folder, source in (("guard", Path(guard_folder("nano:gate"))), ("model", model_path())):
        shutil.copytree(source, folder)
    Path(name).write_bytes(BAD)
    Path(name).chmod(0o600)
    assert main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert Path(name).name in line
    assert "\\xe9" not in line
    assert json.dumps(line)  # printable
