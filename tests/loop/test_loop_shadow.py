"""``lcguard loop shadow``: a candidate beside the live guard, and nothing of what it guards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lcguard.categories import CATEGORIES
from lcguard.cli import app
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.gate import NEVER, GateGuard
from lcguard.guards.registry import Registry
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.store.files import FileStore
from lcguard.store.memory import MemoryStore
from lcguard.store.redis import RedisStore

KEY = "cd" * 32
OPEN = "health"
pytestmark = pytest.mark.slow


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment with the shipped gate, its database and a store."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    folder = tmp_path / "state"
    done = CliRunner().invoke(app, ["loop", "init", "nano:gate", "--dir", str(folder)])
    assert done.exit_code == 0, done.output
    database = Database(folder / "lcguard.sqlite")
    LeakageMeter(database, 0.2, 3600).record_error(("a", "b", "c"), "no engine")
    database.close()
    return folder


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """The same gate, but that it lets one category pass."""
    guard, folder = FrozenGuard.from_pretrained("nano:gate"), tmp_path / "candidate"
    module = guard.module
    assert isinstance(module, GateGuard)
    n, at = len(CATEGORIES), CATEGORIES.index(OPEN)
    weight, bias = module.gate.weight.data, module.gate.bias.data
    with torch.no_grad():
        weight.view(n, -1, weight.shape[1])[at].zero_()
        bias.view(n, -1)[at].fill_(NEVER)
    FrozenGuard(module, guard.card).save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_worse_candidate_shows_and_its_segments_go_nowhere(
    state: Path, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: object, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a segment was stored")

    for kind in (MemoryStore, FileStore, RedisStore):
        monkeypatch.setattr(kind, "put", put)
    monkeypatch.chdir(tmp_path)
    before, live = files(tmp_path), Registry(state / "guards", bytes.fromhex(KEY)).state
    words = ["loop", "shadow", str(candidate), "--dir", str(state), "--out", "shadow"]
    small = ["screen.train_records=40", "screen.test_records=32"]
    done = CliRunner().invoke(app, [*words, *(w for s in small for w in ("--set", s))])
    assert done.exit_code == 0, done.output
    # the only file that is new, and nothing else is another than before
    after = files(tmp_path)
    assert after.keys() - before.keys() == {"shadow/shadow.json"}
    assert {k: after[k] for k in before} == before
    assert Registry(state / "guards", bytes.fromhex(KEY)).state == live

    found = json.loads((tmp_path / "shadow" / "shadow.json").read_text())
    ours, theirs = found["live"], found["candidate"]
    assert ours["digest"] == live.live_version.digest
    assert theirs["digest"] == FrozenGuard.from_pretrained(candidate).digest
    # the same records and the same attack: what differs is the guard
    for category in CATEGORIES:
        one, other = ours["by_category"][category], theirs["by_category"][category]
        assert one["n_secrets"] == other["n_secrets"]
    leaks = theirs["by_category"][OPEN]
    assert leaks["asr_low"] > ours["by_category"][OPEN]["asr"]
    assert theirs["leaked"]["recovered"] > ours["leaked"]["recovered"]
    for side in (ours, theirs):
        assert side["utility"] > 0.5
        assert side["ms"] > 0
    first, second = done.stdout.strip().splitlines()
    assert first.startswith(f"live {ours['digest'][:12]}: ")
    assert second.startswith(f"candidate {theirs['digest'][:12]}: ")
    assert f"{theirs['leaked']['recovered']} of {theirs['leaked']['n_secrets']} values" in second


def test_a_candidate_of_another_model_is_not_compared(
    state: Path, candidate: Path, tmp_path: Path
) -> None:
    FrozenGuard.from_pretrained(candidate).with_card(model_digest="0" * 64).save_pretrained(
        tmp_path / "other"
    )
    out = tmp_path / "shadow"
    words = ["loop", "shadow", str(tmp_path / "other"), "--dir", str(state), "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert "was made for model weights" in str(done.exception)
    assert not out.exists()
