"""A run's figures stand on the card of the guard that it measured, and of no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lcguard.commands.record import record
from lcguard.guards import FrozenGuard
from lcguard.guards.shipped import guard_folder
from lcguard.guards.standing import unproven
from tests.paths import ROOT

DEMO = ROOT / "benchmarks" / "results" / "demo.json"


def test_what_was_measured_speaks_for_the_guard(tmp_path: Path) -> None:
    bare = FrozenGuard.from_pretrained("nano:gate").with_card(evaluation=None, certificate=None)
    bare.save_pretrained(tmp_path / "g")
    assert unproven(bare.card)
    found = record(DEMO, "gate", tmp_path / "g")
    after = FrozenGuard.from_pretrained(tmp_path / "g")
    assert after.card.evaluation == found
    assert after.digest == bare.digest
    assert unproven(after.card) == ""
    assert found["verdict"] == "inconclusive"
    assert found["asr_fresh_ci"][1] > found["asr_fresh"]


def test_the_shipped_cards_say_what_the_shipped_run_measured(tmp_path: Path) -> None:
    for name in ("gate", "residual"):
        shutil.copytree(guard_folder(f"nano:{name}"), tmp_path / name)
        found = record(DEMO, name, tmp_path / name)
        assert FrozenGuard.from_pretrained(f"nano:{name}").card.evaluation == found


def test_a_quick_run_speaks_for_no_guard(tmp_path: Path) -> None:
    shutil.copytree(guard_folder("nano:gate"), tmp_path / "g")
    report = json.loads(DEMO.read_text())
    for row in report["results"]:
        row["quick"] = True
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is a quick run, which judges no guard"):
        record(tmp_path / "report.json", "gate", tmp_path / "g")


def test_another_guard_is_not_credited(tmp_path: Path) -> None:
    shutil.copytree(guard_folder("nano:gate-full"), tmp_path / "g")
    before = (tmp_path / "g" / "lcguard_config.json").read_bytes()
    with pytest.raises(ValueError, match=r"measured a guard 'gate' of digest .* in .* lies"):
        record(DEMO, "gate", tmp_path / "g")
    with pytest.raises(
        ValueError, match=r"demo\.json: guard 'gat' is unknown: did you mean 'gate'"
    ):
        record(DEMO, "gat", tmp_path / "g")
    assert (tmp_path / "g" / "lcguard_config.json").read_bytes() == before
