"""The README shows the figures of the committed results, no others, and names files that exist."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0, "run python scripts/readme_tables.py --write"


def test_another_figure_would_be_found(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    found = tables.sections()
    assert found
    name, body = next(iter(found.items()))
    digit = re.search(r"0\.\d{3}", body)
    assert digit is not None
    altered = text.replace(digit[0], "0.123", 1)
    assert tables.fill(altered, {name: body}) != altered


def test_paths_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:scripts|agents|attacks|lcguard|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert "back pain" in shown[0]
    assert shown[0].count("back pain") == 2  # the task's answer survives the gate
    assert "912-55-1029" in shown[1]
    assert shown[1].count("912-55-1029") == 1  # the secret does not


def test_the_proxys_client_is_the_example() -> None:
    """Which ``tests/server/test_proxy.py`` runs."""
    code = (ROOT / "examples" / "two_agents.py").read_text()
    shown = code[code.index("import os") :]
    assert f"```python\n{shown}```" in (ROOT / "README.md").read_text()
