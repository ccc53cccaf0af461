"""A shipped guard's certificate is taken anew by a command, and by no other way onto its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.certify import certify_guard
from lcguard.guards import FrozenGuard
from lcguard.guards.standing import unproven

SMALL = ["data.train_records=2", "data.test_records=24", "references=6", "pairs=8"]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The shipped gate, of which nothing is known."""
    folder = tmp_path / "gate"
    card = {"certificate": None, "evaluation": None}
    FrozenGuard.from_pretrained("nano:gate").with_card(**card).save_pretrained(folder)
    return folder


def test_the_command_certifies(gate: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "certificate.json"
    sets = [x for s in SMALL for x in ("--set", s)]
    done = CliRunner().invoke(app, ["eval", "certify", str(gate), *sets, "--out", str(out)])
    assert done.exit_code == 0, done.output
    said = done.stdout.splitlines()
    assert said[0].startswith("certificate: ")
    assert said[1].startswith("one secret: named by no attacker more often than ")
    assert sum(x.startswith("guessed blind ") for x in said) == 4
    assert said[-1].startswith("measured: from ")
    made = json.loads(out.read_text())
    assert made["guard_digest"] == FrozenGuard.from_pretrained(gate).digest
    assert made["data"] == {"source": "generator", "seed": 5000, "test_records": 24}
    found = made["certificate"]
    assert found["n_pairs"] == 8
    assert 5 <= found["secrets"]["ceilings"][0]["secrets"] <= 24
    assert FrozenGuard.from_pretrained(gate).card.certificate is None


def test_it_goes_onto_the_card(gate: Path) -> None:
    """A dozen secrets prove little: the bound says so, and the guard stays one to name."""
    before = FrozenGuard.from_pretrained(gate)
    found = certify_guard(str(gate), SMALL, None, "test", card=True)
    after = FrozenGuard.from_pretrained(gate)
    assert after.card.certificate == json.loads(json.dumps(found))
    assert after.digest == before.digest
    assert found["asr_ceiling"] > 0.25
    assert "its certificate " in unproven(after.card)


def test_what_cannot_be_certified_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adds no noise"):
        certify_guard("nano:residual", SMALL, None, "test")
    with pytest.raises(ValueError, match=r"level=2\.0 must be"):
        certify_guard("nano:gate", [*SMALL, "level=2.0"], None, "test")
    with pytest.raises(ValueError, match="refs = 3: unknown key"):
        certify_guard("nano:gate", ["refs=3"], None, "test")
