"""The code blocks of README and documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.paths import ROOT

PAGES = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text()
    for found in _BLOCK.finditer(text):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def every_block(language: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language == language]


def block(page: str, part: str) -> str:
    """The code of the page's only block that holds ``part``."""
    (found,) = [b.code for b in blocks(page) if part in b.code]
    return found
