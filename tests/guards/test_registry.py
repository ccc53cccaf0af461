"""The registry: what may become live, what comes back, and that nothing altered is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import CARD, WEIGHTS, Card, FrozenGuard, GuardError
from lcguard.guards.registry import Judgement, Registry, RegistryError, record_mark
from lcguard.guards.registry_file import REGISTRY_FILE, live_digest, read_registry
from lcguard.guards.shipped import guard_folder
from tests.matrix import GUARDS

KEY, OTHER = b"k" * 32, b"o" * 32
GOOD = Judgement(accepted=True, reason="nothing speaks against it")
BAD = Judgement(accepted=False, reason="contact leaks")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Folders of guards with random weights of their own."""

    def made(seed: int, kind: str = "gate", model: str = "a" * 64) -> Path:
        torch.manual_seed(seed)
        module = guard_class(kind).build(KVShape(2, 1, 8), len(CATEGORIES), dict(GUARDS[kind]))
        card = Card(
            guard=kind, options=module.options(), shape=(2, 1, 8), model_digest=model, claim=""
        )
        folder = tmp_path / f"{kind}-{seed}-{model[:4]}"
        FrozenGuard(module, card).save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def registry(tmp_path: Path, make: Callable[..., Path]) -> Registry:
    """With v1 live, v2 accepted and v3 refused."""
    found = Registry(tmp_path / "guards", KEY)
    for seed, judgement in enumerate((GOOD, GOOD, BAD)):
        found.add(make(seed), judgement)
    found.promote("v1", "the first")
    return found


def test_what_was_accepted_becomes_live_and_its_folder_is_the_registrys(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    for name in ("v1", "v2"):
        registry.promote(name, "better")
        version = registry.state.version(name)
        assert guard_folder(str(registry.folder)) == str(registry.folder / "versions" / name)
        assert FrozenGuard.from_pretrained(registry.folder).digest == version.digest
        assert live_digest(str(registry.folder)) == version.digest
    assert live_digest("nano:gate") == ""
    events = [(e.serial, e.what, e.version) for e in registry.state.events]
    assert events[3:] == [(4, "promote", "v1"), (5, "promote", "v2")]
    assert registry.verify() == []


def test_a_refused_version_is_kept_and_never_live(
    registry: Registry, make: Callable[..., Path]
) -> None:
    with pytest.raises(RegistryError, match="v3 was refused: contact leaks"):
        registry.promote("v3", "please")
    with pytest.raises(RegistryError, match="v3 is this guard, and was judged otherwise"):
        registry.add(make(2), GOOD)
    assert registry.add(make(1), GOOD).name == "v2"
    assert registry.state.live == "v1"
    with pytest.raises(RegistryError, match="version 'v9' is unknown"):
        registry.promote("v9", "please")


def test_a_guard_of_another_kind_or_model_cannot_take_its_place(
    registry: Registry, make: Callable[..., Path]
) -> None:
    for folder, field in (
        (make(7, "residual"), "guard"),
        (make(8, model="b" * 64), "model_digest"),
    ):
        name = registry.add(folder, GOOD).name
        with pytest.raises(RegistryError, match=f"{name} has {field} "):
            registry.promote(name, "please")
    assert registry.state.live == "v1"


def test_rollback_withdraws_and_passes_over_what_may_not_be_served(
    registry: Registry, make: Callable[..., Path]
) -> None:
    registry.add(make(5), GOOD)
    registry.promote("v2", "better")
    registry.withdraw("v1", "leaked on a hop")
    registry.promote("v4", "better still")
    assert registry.rollback("it leaks").name == "v2"
    assert registry.state.live == "v2"
    assert registry.state.version("v4").withdrawn == "it leaks"
    before = (registry.folder / REGISTRY_FILE).read_bytes()
    with pytest.raises(RegistryError, match="no earlier version may be served in place of v2"):
        registry.rollback("it leaks too")
    assert (registry.folder / REGISTRY_FILE).read_bytes() == before
    with pytest.raises(RegistryError, match="v4 was withdrawn: it leaks"):
        registry.promote("v4", "again")


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_altered_files_are_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    folder = registry.folder / "versions" / "v2"
    altered(folder / WEIGHTS)
    with pytest.raises(RegistryError, match=r"v2: .* the file was altered or cut"):
        registry.promote("v2", "better")
    live = registry.folder / "versions" / "v1"
    card: dict[str, Any] = json.loads((live / CARD).read_text())
    (live / CARD).write_text(json.dumps(card | {"claim": "perfect"}))
    with pytest.raises(ValueError, match="the registry signed"):
        FrozenGuard.from_pretrained(registry.folder)
    wrong = registry.verify()
    assert len(wrong) == 2
    assert registry.state.live == "v1"


def test_the_pointer_is_moved_by_the_key_alone(registry: Registry, tmp_path: Path) -> None:
    path = registry.folder / REGISTRY_FILE
    state: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"live": "v3"}))
    for key in (KEY, OTHER):
        with pytest.raises(RegistryError, match="not signed with this deployment's key"):
            read_registry(registry.folder, key)
    with pytest.raises(RegistryError, match="not signed"):
        registry.promote("v2", "better")
    path.write_text(json.dumps(state))
    with pytest.raises(RegistryError, match="not signed"):
        Registry(registry.folder, OTHER).promote("v2", "better")
    assert registry.promote("v2", "better").name == "v2"


def test_marks_are_those_of_the_whole_line(registry: Registry, make: Callable[..., Path]) -> None:
    first = registry.add(make(10), GOOD, marks=[record_mark("a"), record_mark("b")])
    second = registry.add(make(11), GOOD, parent=first.digest, marks=[record_mark("c")])
    assert registry.marks(second) == {record_mark(x) for x in "abc"}
    assert registry.marks(first) == {record_mark(x) for x in "ab"}
    (registry.folder / "versions" / first.name / "records.txt").write_text("")
    with pytest.raises(RegistryError, match=r"records\.txt was altered"):
        registry.marks(second)


def test_many_writers_leave_every_change(registry: Registry, make: Callable[..., Path]) -> None:
    folders = [make(20 + i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(lambda f: Registry(registry.folder, KEY).add(f, GOOD).name, folders))
    assert sorted(names) == [f"v{i}" for i in range(4, 10)]
    assert registry.verify() == []


def test_a_copy_that_was_never_signed_is_written_over(
    registry: Registry, make: Callable[..., Path]
) -> None:
    left = registry.folder / "versions" / "v4"
    left.mkdir()
    (left / CARD).write_text("half")
    assert registry.add(make(30), GOOD).name == "v4"
    assert registry.verify() == []


def test_what_is_no_guard_is_not_taken_in(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match="no readable"):
        registry.add(tmp_path / "empty", GOOD)
    assert issubclass(GuardError, ValueError)
