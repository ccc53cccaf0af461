"""The guards on the disk: a registry's are followed, and nothing altered passes for what runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.frozen import CARD, FrozenGuard
from lcguard.guards.registry import Judgement, Registry
from lcguard.guards.shipped import guard_folder
from lcguard.server.errors import ProxyError
from lcguard.server.health.guard_files import GuardFiles

KEY = "ab" * 32
GOOD = Judgement(accepted=True, reason="a test's")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """With the shipped gate live, and another that nothing speaks for."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    found = Registry(tmp_path / "guards", bytes.fromhex(KEY))
    found.add(Path(guard_folder("nano:gate")), GOOD)
    other = FrozenGuard.from_pretrained("nano:gate-full")
    other.with_card(certificate=None, evaluation=None).save_pretrained(tmp_path / "other")
    found.add(tmp_path / "other", GOOD)
    found.promote("v1", "the first")
    return found


def test_a_promotion_is_seen_and_holds_until_the_engine_runs_it(registry: Registry) -> None:
    v1, v2 = registry.state.versions
    files = GuardFiles({"gate": str(registry.folder), "plain": "nano:gate"})
    running = {"gate": v1.digest, "plain": v1.digest, "redact": "r" * 64}
    assert not files.promoted(running)
    assert files.check(running) == "2 as the engine runs them"
    certified = dict(files.certificates)
    assert set(certified) == {"gate", "plain"}
    registry.promote("v2", "better")
    assert files.promoted(running)
    with pytest.raises(ProxyError, match="v2 was promoted, and the engine could not take it over"):
        files.check(running)
    running["gate"] = v2.digest
    assert not files.promoted(running)
    files.check(running)
    shown = files.unproven
    files.read_cards()
    assert "neither a certificate nor an evaluation" in shown["gate"]
    assert files.certificates == {"plain": certified["plain"]}


def test_an_altered_registry_stops_publishing(registry: Registry) -> None:
    files = GuardFiles({"gate": str(registry.folder)})
    running = {"gate": registry.state.live_version.digest}
    card = registry.folder / "versions" / "v1" / CARD
    good = card.read_text()
    card.write_text(good.replace('"claim"', '"claim" '))
    with pytest.raises(ProxyError, match="the file was altered"):
        files.check(running)
    card.write_text(good)
    files.check(running)
    pointer = registry.folder / "registry.json"
    pointer.write_text(pointer.read_text().replace('"live": "v1"', '"live": "v2"'))
    assert not files.promoted(running)
    with pytest.raises(ProxyError, match="not signed with this deployment's key"):
        files.check(running)
