"""What became of a deployment's guards, on its dashboard."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import Card, FrozenGuard
from lcguard.guards.registry import Judgement, Registry
from lcguard.guards.registry_file import REGISTRY_FILE
from lcguard.server.dashboard.guard_versions import guard_versions
from tests.matrix import GUARDS
from tests.server.dashboard.views import FRESH

pytest.importorskip("jinja2", reason="the dashboard needs jinja2: pip install lcguard[server]")

from lcguard.server.dashboard.page import new_nonce, render

KEY = "ab" * 32


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The demo's story: a guard that leaks, its repair, a refusal, and a bad one rolled back."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    found = Registry(tmp_path / "guards", bytes.fromhex(KEY))

    def add(seed: int, accepted: bool, reason: str, parent: str = "") -> str:
        torch.manual_seed(seed)
        module = guard_class("gate").build(KVShape(2, 1, 8), len(CATEGORIES), dict(GUARDS["gate"]))
        card = Card(guard="gate", options=module.options(), shape=(2, 1, 8))
        folder = tmp_path / f"g{seed}"
        FrozenGuard(module, card).save_pretrained(folder)
        return found.add(folder, Judgement(accepted=accepted, reason=reason), parent=parent).name

    found.promote(add(1, True, "served before anybody measured it"), "the first")
    first = found.state.live_version
    found.withdraw("v1", "contact leaks")
    found.promote(add(2, True, "keeps everything", first.digest), "keeps everything")
    add(3, False, "health leaks: 43%")
    found.promote(add(4, True, "the operator is sure"), "by hand")
    found.rollback("finance leaks: 33 of 33 read")
    return found


def page(folders: dict[str, str]) -> str:
    versions, changes, errors = guard_versions(folders)
    view = replace(FRESH, versions=versions, changes=changes, registry_errors=errors)
    return render(view, new_nonce())


def rows(html: str, table: str) -> list[list[str]]:
    """The cells of a table, top to bottom."""
    body = html.split(f'class="cards {table}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    found = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[re.sub(r"<.*?>", "", cell) for cell in row] for row in found]


def test_versions_and_what_happened_to_them_are_shown(registry: Registry) -> None:
    html = page({"gate": str(registry.folder), "other": "nano:gate"})
    shown = [(name, state, parent, why) for name, state, _, parent, why in rows(html, "guards")]
    assert shown == [
        ("gate v4", "withdrawn", "", "finance leaks: 33 of 33 read"),
        ("gate v3", "refused", "", "health leaks: 43%"),
        ("gate v2", "live", "v1", "keeps everything"),
        ("gate v1", "withdrawn", "", "contact leaks"),
    ]
    changed = [(what, version, why) for _, what, version, why in rows(html, "changes")]
    assert changed[:4] == [
        ("rollback to", "gate v2", "finance leaks: 33 of 33 read"),
        ("promoted", "gate v4", "by hand"),
        ("taken in", "gate v4", "the operator is sure"),
        ("taken in", "gate v3", "refused: health leaks: 43%"),
    ]
    assert "cannot be used" not in html


def test_a_live_version_that_leaks_is_not_shown_as_good(registry: Registry) -> None:
    registry.withdraw("v2", "leaks too")
    (live,) = [v for v in guard_versions({"gate": str(registry.folder)})[0] if v.name == "v2"]
    assert live.state == "live, leaks"


def test_of_an_altered_registry_nothing_is_shown_but_that(registry: Registry) -> None:
    path = registry.folder / REGISTRY_FILE
    path.write_text(path.read_text().replace("health leaks", "nothing leaks"))
    html = page({"gate": str(registry.folder)})
    assert "its registry cannot be used" in html
    assert "not signed with this deployment" in html
    assert "nothing leaks" not in html


def test_without_a_registry_there_is_no_such_section() -> None:
    html = page({"gate": "nano:gate"})
    assert 'class="cards guards"' not in html
    assert "#guards" not in html
