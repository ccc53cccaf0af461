"""Writes the tables of what works together into docs/operations.md.

python scripts/compatibility.py            # print
python scripts/compatibility.py --write    # rewrite what stands between the markers
python scripts/compatibility.py --check    # exit 1 where something else stands there
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcguard.commands.script import run_script
from lcguard.config import read_mapping
from lcguard.vllm import TESTED_VERSIONS

ROOT = Path(__file__).parent.parent
DATA = ROOT / "scripts" / "configs" / "compatibility.yaml"
PAGE = ROOT / "docs" / "operations.md"
WORDS = ("yes", "refused")


@dataclass(frozen=True)
class Cell:
    """One statement, and the test that shows it."""

    table: str
    row: str
    column: str
    word: str
    test: str
    """``FILE::FUNCTION`` or ``FILE::FUNCTION[PARAMETER]``."""

    @property
    def function(self) -> str:
        return self.test.partition("[")[0]


def cells(data: Mapping[str, Any]) -> Iterator[Cell]:
    """Every statement. Raises ``ValueError`` for a word, a column or a test that is none."""
    for table, found in data.items():
        for row, said in found["rows"].items():
            for column, given in said.items():
                if column not in found["columns"]:
                    raise ValueError(f"{table}: {row}: {column!r} is no column")
                one = given[0] if isinstance(given, list) else given
                word = "yes" if one is True else one  # as YAML reads it
                test = given[1] if isinstance(given, list) else found["columns"][column]
                if word not in WORDS or not test:
                    raise ValueError(f"{table}: {row}: {column}: {word!r} by {test!r}")
                yield Cell(table, row, column, word, test.format(row=row))


def tables(data: Mapping[str, Any]) -> dict[str, str]:
    """Marker -> table in Markdown, with the tests by number under it."""
    by_place = {(c.table, c.row, c.column): c for c in cells(data)}
    out = {}
    for table, found in data.items():
        names = list(found["columns"])
        lines = [f"| {' | '.join([found['head'], *map(_titled, names)])} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        tests: dict[str, int] = {}
        for row in found["rows"]:
            shown = [_shown(by_place.get((table, row, column)), tests) for column in names]
            lines.append(f"| {' | '.join([row, *shown])} |")
        told = "; ".join(f"{n} `{test}`" for test, n in tests.items())
        out[f"works_{table}"] = "\n".join([*lines, "", f"Shown by: {told}."])
    return out


def _titled(column: str) -> str:
    version = " or ".join(TESTED_VERSIONS)
    return f"{column} {version}" if column == "inside vLLM" else column


def _shown(cell: Cell | None, tests: dict[str, int]) -> str:
    """``tests``: function -> its number; a new one gets the next."""
    if cell is None:
        return "not tested"
    return f"{cell.word} ({tests.setdefault(cell.function, len(tests) + 1)})"


def fill(page: str, found: Mapping[str, str]) -> str:
    """The page with the tables between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    return re.sub(
        r"<!-- (works_\w+) -->\n.*?<!-- /\1 -->",
        lambda at: f"<!-- {at[1]} -->\n{found[at[1]]}\n<!-- /{at[1]} -->",
        page,
        flags=re.S,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    found, before = tables(read_mapping(DATA)), PAGE.read_text()
    after = fill(before, found)
    if args.write:
        PAGE.write_text(after)
    elif not args.check:
        print("\n\n".join(found.values()))
    return int(args.check and after != before)


if __name__ == "__main__":
    run_script(main)
