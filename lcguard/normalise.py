"""One text in the forms under which values are looked for, each with the way back.

A value is the same value in another width, case, composition or spacing, with zero-width
characters in it, with other separators or none. ``folded`` keeps a text readable, for detectors
that go by patterns; ``skeleton`` keeps letters, digits and marks alone, for values that are named.
Both map every character back to the range of the text that it came from, so what is found can be
covered there.

What only looks alike (a Cyrillic letter for a Latin one), is spelled in words, abbreviated or
encoded is another text here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

# Default_Ignorable_Code_Point beside the category Cf: what no reader sees.
_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
_MINUS = "\u2212"  # to Unicode a symbol, no dash


@dataclass(frozen=True)
class Form:
    """A form of a text. Character ``i`` of it comes from ``[starts[i], ends[i])`` of the text."""

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The text's range behind ``[start, end)`` of the form, which holds a character."""
        return self.starts[start], self.ends[end - 1]


def folded(text: str) -> Form:
    """NFKC without unseen characters; every dash is ``-``, every run of white space one space.
    Case is kept."""
    return _form(_spaced(_clusters(text)))


def skeleton(text: str) -> Form:
    """NFKC and case-folded letters, digits and combining marks; nothing between them."""
    return _form(
        (kept, start, end)
        for piece, start, end in _clusters(text)
        if (kept := "".join(c for c in _cased(piece) if unicodedata.category(c)[0] in "LNM"))
    )


def occurrences(text: str, value: str, form: Form | None = None) -> list[tuple[int, int]]:
    """Ranges of ``text`` where ``value`` stands, as written or in another spelling, in order;
    they may overlap. ``form`` is ``skeleton(text)`` where it is known."""
    form = form or skeleton(text)
    bare = skeleton(value).text
    found = {form.origin(i, i + len(bare)) for i in _find_all(form.text, bare)}
    # as written too: a value may be of signs alone, or end before a combining mark of the text
    found |= {(i, i + len(value)) for i in _find_all(text, value)}
    return sorted(found)


def _form(pieces: Iterator[tuple[str, int, int]]) -> Form:
    parts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for piece, start, end in pieces:
        parts.append(piece)
        starts += [start] * len(piece)
        ends += [end] * len(piece)
    return Form("".join(parts), tuple(starts), tuple(ends))


def _clusters(text: str) -> Iterator[tuple[str, int, int]]:
    """The text in NFKC, in the smallest pieces that NFKC treats apart, with their ranges."""
    cluster, first, last = "", 0, 0
    for i, c in enumerate(text):
        if not c.isascii() and (c in _UNSEEN or unicodedata.category(c) == "Cf"):
            continue
        if cluster and not _joins(cluster, c):
            yield unicodedata.normalize("NFKC", cluster), first, last
            cluster = ""
        if not cluster:
            first = i
        cluster, last = cluster + c, i + 1
    if cluster:
        yield unicodedata.normalize("NFKC", cluster), first, last


def _joins(cluster: str, c: str) -> bool:
    """Whether NFKC of both is other than NFKC of each."""
    if c.isascii():
        return False
    nfkc = unicodedata.normalize
    # A cluster of more marks than any script stacks is cut: each mark would cost its length.
    return len(cluster) < 32 and (
        bool(unicodedata.combining(nfkc("NFKD", c)[0]))
        or nfkc("NFKC", cluster + c) != nfkc("NFKC", cluster) + nfkc("NFKC", c)
    )


def _spaced(pieces: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    space: tuple[int, int] | None = None
    for piece, start, end in pieces:
        if piece.isspace():
            space = (space[0] if space else start, end)
            continue
        if space:
            yield " ", *space
            space = None
        yield "".join("-" if _dash(c) else c for c in piece), start, end
    if space:
        yield " ", *space


def _dash(c: str) -> bool:
    return not c.isascii() and (c == _MINUS or unicodedata.category(c) == "Pd")


def _cased(piece: str) -> str:
    if piece.isascii():
        return piece.lower()
    return unicodedata.normalize("NFKC", piece.casefold())


def _find_all(text: str, value: str) -> Iterator[int]:
    """Every start of ``value``, those that overlap too, in time linear in both."""
    if not value:
        return
    border = _borders(value)
    period = len(value) - border[-1]
    if 2 * period >= len(value):
        at = text.find(value)
        while at >= 0:
            yield at
            at = text.find(value, at + period)
        return
    # One that repeats itself may start at every character of a run of it: Knuth, Morris and Pratt.
    n = 0
    for i, c in enumerate(text):
        while n and (n == len(value) or value[n] != c):
            n = border[n - 1]
        n += value[n] == c
        if n == len(value):
            yield i + 1 - n


def _borders(value: str) -> list[int]:
    """For each prefix, the length of its longest proper border."""
    out = [0]
    for c in value[1:]:
        n = out[-1]
        while n and value[n] != c:
            n = out[n - 1]
        out.append(n + (value[n] == c))
    return out
