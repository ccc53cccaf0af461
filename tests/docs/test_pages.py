"""Pages: the figures are those of the committed results, and what is named or linked is there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.blocks import PAGES
from tests.paths import ROOT
from tests.test_import_rules import MAY_IMPORT

_LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "result_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")  # as where it is started
        spec.loader.exec_module(module)
        yield module


def test_tables_are_those_of_the_results(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0, "run python scripts/result_tables.py --write"


def test_another_figure_would_be_found(tables: ModuleType) -> None:
    found = tables.sections()
    for page in tables.PAGES:
        text = page.read_text()
        (marker, *_) = re.findall(r"<!-- (\w+) -->", text)
        digit = re.search(r"0\.\d{3}", found[marker])
        assert digit is not None
        altered = text.replace(digit[0], "0.123", 1)
        assert tables.fill(altered, found) == text


def test_every_table_has_its_place(tables: ModuleType) -> None:
    shown = {m for p in tables.PAGES for m in re.findall(r"<!-- (\w+) -->", p.read_text())}
    assert shown == {*tables.TABLES, *tables.JOINED}
    with pytest.raises(ValueError, match="no results"):
        tables.fill("<!-- nothing -->\n<!-- /nothing -->", {})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    wanted = r"`((?:scripts|agents|attacks|lcguard|tests|server|examples)/[\w./-]+)"
    for path in re.findall(wanted, text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES, "llms.txt"])
def test_links_lead_somewhere(page: str) -> None:
    for link in _LINK.findall((ROOT / page).read_text()):
        if not link.startswith("https://"):
            assert ((ROOT / page).parent / link).exists(), link


def test_the_tree_is_the_tree() -> None:
    """The one of the architecture page: what stands at the beginning of its lines is there."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    folder = ROOT
    for line in text.split("```text\n")[1].split("```")[0].splitlines():
        name = line[2:].split(" ")[0] if line.startswith("  ") else line.split(" ")[0]
        if not name:
            continue
        folder = folder if line.startswith("  ") else ROOT / name
        assert ((folder / name) if line.startswith("  ") else folder).exists(), line


def test_the_import_rules_are_those_that_are_tested() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*`.*) \| (.*) \|$", text, re.M)
    told = {
        room: {"nothing of the rooms": set(), "everything": set(MAY_IMPORT) - {"commands"}}.get(
            rooms, set(rooms.split("; ")[0].split(", "))
        )
        for names, rooms in rows
        for room in re.findall("`(\\w+)`", names)
    }
    assert told == MAY_IMPORT


def test_the_map_for_machines_has_every_page() -> None:
    links = set(_LINK.findall((ROOT / "llms.txt").read_text()))
    pages = {p for p in PAGES if not p.startswith("docs/reference/")}
    notebooks = {p.relative_to(ROOT).as_posix() for p in Path(ROOT, "docs").rglob("*.ipynb")}
    assert pages | notebooks <= links
