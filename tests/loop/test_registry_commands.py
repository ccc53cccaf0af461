"""``lcguard registry``: what the commands print, and that they change what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.serve import load_settings
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.frozen import WEIGHTS, FrozenGuard, finders
from lcguard.guards.registry_file import REGISTRY_FILE
from lcguard.server.database.writer import Database


def test_from_the_first_version_to_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "cd" * 32)
    where = ["--dir", str(tmp_path)]

    def call(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*words, *where])
        assert done.exit_code == code, done.output
        return done.output

    assert "v1 is live" in call("loop", "init", "nano:gate")
    accepted = call("registry", "add", "nano:gate-agentleak", "--accept", "measured by hand")
    assert accepted.strip() == "v2"
    assert "v2 is live" in call("registry", "promote", "v2")
    shown = call("registry", "list")
    assert [w in shown for w in ("v1", "v2", "live", "ready", "by hand")] == [True] * 5
    root = tmp_path / "guards"
    settings = load_settings(tmp_path, None, [f"engine.guards={{gate: {root}}}"], None)
    assert finders(settings.engine.guards) == {"redact"}
    live = FrozenGuard.from_pretrained(root).digest
    assert live == FrozenGuard.from_pretrained("nano:gate-agentleak").digest
    assert "v1 is live" in call("registry", "rollback", "--why", "billing complained")
    assert "withdrawn" in call("registry", "list")
    assert "2 versions as they were signed, live v1, change 5" in call("registry", "verify")
    assert "none: v1 is live" in call("loop", "watch", "--once", "--database", empty(tmp_path))
    weights = root / "versions" / "v2" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "v2: " in call("registry", "verify", code=1)
    (root / REGISTRY_FILE).write_text((root / REGISTRY_FILE).read_text().replace("v1", "v2", 1))
    done = CliRunner().invoke(app, ["registry", "list", *where])
    assert "not signed with this deployment's key" in str(done.exception)


def empty(folder: Path) -> str:
    path = folder / "found.sqlite"
    Database(path).close()
    return str(path)


def test_the_loops_options_are_printed_as_they_are_read() -> None:
    done = CliRunner().invoke(app, ["loop", "config", "--set", "limit=0.1"])
    assert done.exit_code == 0
    assert "limit: 0.1" in done.output
    assert "Usage" in CliRunner().invoke(app, ["loop"]).output
