"""What works together: the tables are those of the data, and every line has its test."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from lcguard.config import read_mapping
from lcguard.rope import MODEL_TYPES
from lcguard.vllm import TESTED_VERSIONS
from tests.paths import ROOT


@pytest.fixture(scope="module")
def works() -> Iterator[ModuleType]:
    path = ROOT / "scripts" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("works", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "works", module)  # where its dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


@cache
def parsed(path: str) -> tuple[set[str], set[str]]:
    """The functions of a test file, and every text in it and in what it takes its cases from."""
    functions: set[str] = set()
    texts: set[str] = set()
    for name in (path, "tests/core/tiny_models.py", "lcguard/rope.py"):
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and name == path:
                functions.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return functions, texts


def missing(test: str) -> str:
    """What of ``FILE::FUNCTION[PARAMETER]`` is not there."""
    path, _, rest = test.partition("::")
    name, _, parameter = rest.partition("[")
    if not (ROOT / path).is_file():
        return path
    functions, texts = parsed(path)
    if name not in functions or not name.startswith("test_"):
        return name
    return "" if not parameter or parameter.removesuffix("]") in texts else parameter


def test_every_line_has_its_test(works: ModuleType) -> None:
    found = list(works.cells(read_mapping(works.DATA)))
    assert len(found) > 40
    assert [(c.row, c.column, missing(c.test)) for c in found if missing(c.test)] == []


@pytest.mark.parametrize(
    "test",
    [
        "tests/core/test_ropes.py::test_unrotated_keys_hold_no_position",
        "tests/core/test_rope.py::test_unrotated_keys_hold_a_position",
        "tests/core/test_rope.py::test_unrotated_keys_hold_no_position[gpt17]",
        "tests/core/test_rope.py::tiny",
    ],
)
def test_another_test_would_be_missed(test: str) -> None:
    assert missing(test)


def test_the_page_has_the_tables(works: ModuleType) -> None:
    assert works.main(["--check"]) == 0, "python scripts/compatibility.py --write"
    page = works.PAGE.read_text()
    for marker in works.tables(read_mapping(works.DATA)):
        assert f"<!-- {marker} -->" in page


def test_every_supported_family_has_its_row(works: ModuleType) -> None:
    data = read_mapping(works.DATA)
    assert set(data["families"]["rows"]) == set(MODEL_TYPES)
    assert f"inside vLLM {TESTED_VERSIONS[0]}" in works.PAGE.read_text()


@pytest.mark.parametrize(
    "cell", [["perhaps", "tests/x.py::test_x"], "yes", ["yes", ""]], ids=["word", "none", "empty"]
)
def test_a_statement_without_a_test_is_refused(works: ModuleType, cell: Any) -> None:
    data = {"t": {"head": "x", "columns": {"c": ""}, "rows": {"r": {"c": cell}}}}
    with pytest.raises(ValueError, match="t: r: c: "):
        list(works.cells(data))
