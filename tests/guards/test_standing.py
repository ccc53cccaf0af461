"""A guard of which nothing was measured is not served without being named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcguard.guards import FrozenGuard
from lcguard.guards.frozen import Card
from lcguard.guards.standing import check_proven, unproven, unproven_guards

VACUOUS = {"mean_nats": 799_448.0, "vacuous": True}
TIGHT = {"mean_nats": 0.4, "vacuous": False, "asr_ceiling": 0.25}
LOOSE = {"mean_nats": 5.0, "vacuous": False, "asr_ceiling": 0.41}


def card(**changes: Any) -> Card:
    return Card(guard="gate", options={}, shape=(4, 2, 32), **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "neither a certificate nor an evaluation"),
        ({"certificate": VACUOUS}, "its certificate of 7.994e+05 nats is vacuous"),
        ({"certificate": VACUOUS, "evaluation": {"verdict": "leaks"}}, "says that it leaks"),
        ({"certificate": TIGHT, "evaluation": {"verdict": "leaks"}}, "says that it leaks"),
        ({"evaluation": {"verdict": "not measured"}}, "measured too little"),
        ({"certificate": TIGHT}, ""),
        ({"certificate": LOOSE}, "its certificate leaves an attacker 41.0% of the secrets"),
        ({"certificate": {"mean_nats": 0.4, "vacuous": False}}, "leaves an attacker 100.0%"),
        ({"certificate": LOOSE, "evaluation": {"verdict": "protects"}}, ""),
        ({"certificate": VACUOUS, "evaluation": {"verdict": "protects"}}, ""),
        ({"evaluation": {"held_out": {}}}, ""),
    ],
)
def test_what_speaks_for_a_guard(changes: dict[str, Any], why: str) -> None:
    found = unproven(card(**changes))
    assert why in found
    assert bool(found) == bool(why)


def test_it_is_served_by_name_alone(tmp_path: Path) -> None:
    FrozenGuard.from_pretrained("nano:gate").with_card(
        evaluation=None, certificate=VACUOUS
    ).save_pretrained(tmp_path / "g")
    guards = {"mine": str(tmp_path / "g"), "gate": "nano:gate", "none": "./nowhere"}
    assert list(unproven_guards(guards)) == ["mine"]
    with pytest.raises(
        ValueError, match=r"guards\.mine: nothing shows .*engine\.unproven=\[mine\]"
    ):
        check_proven(guards, ["other"], "--set engine.unproven=[{}]")
    check_proven(guards, ["mine"], "")


def test_what_is_offered_unasked_is_proven() -> None:
    assert unproven_guards({"gate": "nano:gate", "twin": "smollm2:twin"}) == {}
    assert "leaks" in unproven_guards({"residual": "nano:residual"})["residual"]
