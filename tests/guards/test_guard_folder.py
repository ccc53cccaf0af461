"""Guards on disk: what is altered or foreign is refused, a failed save leaves the old one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lcguard.guards import frozen
from lcguard.guards.base import GuardModule, guard_class, register
from lcguard.guards.frozen import CARD, WEIGHTS, FrozenGuard, GuardError
from tests.guards.every_guard import SHAPE, guard_of, module_of

# -- the folder on disk


def rewrite_card(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    guard_of("gate").save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"format": 99}, "has format 99, this release reads 1"),
        ({"guard": "nothing"}, "guard 'nothing' is unknown: use one of "),
        ({"options": {"colour": 1}}, "guard 'gate' has no option 'colour'"),
        ({"options": {"width": 31}}, "width 31 must be a multiple of 32"),
        ({"options": {"width": "wide"}}, CARD),
        ({"shape": [2, 2]}, "shape"),
        ({"shape": [2, 2, 4]}, "cannot be used"),
        ({"categories": ["person"]}, "train it again"),
        ({"weights_sha256": "0" * 64}, "was altered or cut"),
    ],
)
def test_changed_cards_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    rewrite_card(folder, lambda card: card.update(change))
    with pytest.raises(GuardError) as error:
        FrozenGuard.from_pretrained(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    for damaged in (raw[:-5], raw[:3], b"", bytes([*raw[:-1], raw[-1] ^ 1])):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(GuardError, match="altered or cut"):
            FrozenGuard.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(GuardError, match="cannot be used"):
        FrozenGuard.from_pretrained(folder)
    (folder / CARD).write_bytes(b"\xff\xfe")
    with pytest.raises(GuardError, match="no readable"):
        FrozenGuard.from_pretrained(folder)
    (folder / CARD).unlink()
    with pytest.raises(GuardError, match="give a guard's folder"):
        FrozenGuard.from_pretrained(folder)


def test_weights_that_match_the_card_but_not_the_guard_are_refused(folder: Path) -> None:
    """An honest digest does not make foreign weights fit."""
    state = load_file(folder / WEIGHTS)
    state.pop("codebook")
    save_file(state, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    rewrite_card(folder, lambda card: card.update(weights_sha256=digest))
    with pytest.raises(GuardError, match="cannot be used"):
        FrozenGuard.from_pretrained(folder)


def test_foreign_models_are_refused(folder: Path) -> None:
    assert FrozenGuard.from_pretrained(folder, model_digest="d" * 64, shape=SHAPE)
    with pytest.raises(GuardError, match="model weights dddddddddddd, this model has eeeeeeeeeeee"):
        FrozenGuard.from_pretrained(folder, model_digest="e" * 64)
    with pytest.raises(GuardError, match=r"for KV shape \(2, 2, 8\), the model has \(2, 1, 8\)"):
        FrozenGuard.from_pretrained(folder, shape=(2, 1, 8))


def test_a_guard_without_known_model_serves_none(tmp_path: Path) -> None:
    FrozenGuard(module_of("gate")).save_pretrained(tmp_path / "guard")
    with pytest.raises(GuardError, match="model weights unknown"):
        FrozenGuard.from_pretrained(tmp_path / "guard", model_digest="e" * 64)


@pytest.mark.parametrize("step", ["save", "os.replace"])
def test_a_failed_save_leaves_the_old_guard(
    folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    calls, real = [], os.replace

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if step == "os.replace" and len(calls) != 2:  # the second one puts the new guard in place
            real(*args, **kwargs)
        else:
            raise OSError("disk full")

    if step == "os.replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(frozen, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        guard_of("identity").save_pretrained(folder)
    monkeypatch.undo()
    assert calls
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_save_replaces_guards_and_nothing_else(folder: Path) -> None:
    (folder / "stale").touch()
    guard_of("identity").save_pretrained(folder)
    assert FrozenGuard.from_pretrained(folder).name == "identity"
    assert sorted(p.name for p in folder.iterdir()) == sorted((CARD, WEIGHTS))
    with pytest.raises(GuardError, match="is no guard's folder"):
        guard_of("identity").save_pretrained(folder.parent)
    assert folder.exists()
    (folder.parent / "empty").mkdir()
    guard_of("identity").save_pretrained(folder.parent / "empty")


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="guard name 'gate' is taken by GateGuard"):
        register("gate")(type("Other", (GuardModule,), {}))
    with pytest.raises(ValueError, match="guard 'none' is unknown: use one of "):
        guard_class("none")
