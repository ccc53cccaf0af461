"""One text in the forms under which values are looked for, each with the way back.

A value is the same value in another width, case, composition or spacing, with zero-width
characters in it, with other separators or none. ``folded`` keeps a text readable, for detectors
that go by patterns; ``skeleton`` keeps letters and digits alone, for values that are named;
``unspaced`` keeps signs as well, for values that are made of them. All map every character back to
the range of the text that it came from, so what is found can be covered there.

What only looks alike (a Cyrillic letter for a Latin one), is spelled in words, abbreviated or
encoded is another text here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Default_Ignorable_Code_Point beside the category Cf: what no reader sees.
_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
_FEW = 16
"""Values that are looked for one by one; more of one length by a look at every place."""
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

    def over(self, inner: Form) -> Form:
        """This form of ``inner.text`` as a form of the text behind ``inner``."""
        return Form(
            self.text,
            tuple(inner.starts[i] for i in self.starts),
            tuple(inner.ends[i - 1] for i in self.ends),
        )


def folded(text: str) -> Form:
    """NFKC without unseen characters; every dash is ``-``, every run of white space one space,
    every digit of any script an ASCII one. Case is kept."""
    return _form(_spaced(_clusters(text)))


def unwrapped(text: str) -> Form:
    """As ``folded``, with lines joined where they break: a value that was wrapped is whole."""
    form = folded(text)
    parts = zip(form.text, form.starts, form.ends, strict=True)
    return _form((c, a, b) for c, a, b in parts if not (c == " " and _breaks(text[a:b])))


def _breaks(space: str) -> bool:
    return len(f"{space}.".splitlines()) > 1


def unspaced(text: str) -> Form:
    """All that is seen, NFKC and case-folded, without white space and accents; dashes are ``-``."""
    return _form(
        (kept, start, end)
        for piece, start, end in _clusters(text)
        if (kept := "".join("-" if _dash(c) else c for c in _cased(piece) if not c.isspace()))
    )


def skeleton(text: str) -> Form:
    """NFKC and case-folded letters, digits and vowel signs without accents; nothing between."""
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
    found = {form.origin(i, i + len(bare)) for i in find_all(form.text, bare)}
    # as written too: a value may be of signs alone, or end before a combining mark of the text
    found |= {(i, i + len(value)) for i in find_all(text, value)}
    return sorted(found)


def runs(text: str, values: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Ranges that any of the values covers, each in order of its own; occurrences of one that
    overlap are one range.

    Time is linear in the text for each length that values have.
    """
    by_length: dict[int, set[str]] = {}
    for value in values:
        if value:
            by_length.setdefault(len(value), set()).add(value)
    for n, group in by_length.items():
        if len(group) > _FEW:
            yield from ((i, i + n) for i in range(len(text) - n + 1) if text[i : i + n] in group)
            continue
        for value in group:
            at = text.find(value)
            while at >= 0:
                last = at
                while n > 1 and (more := text.rfind(value, last + 1, last + 2 * n - 1)) >= 0:
                    last = more
                yield at, last + n
                at = text.find(value, last + n)


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
        if _unseen(c):
            continue
        if cluster and not _joins(cluster, c):
            yield _composed(cluster), first, last
            cluster = ""
        if not cluster:
            first = i
        cluster, last = cluster + c, i + 1
    if cluster:
        yield _composed(cluster), first, last


def _unseen(c: str) -> bool:
    if c.isascii():
        return not c.isprintable() and not c.isspace()
    return c in _UNSEEN or (unicodedata.category(c) in ("Cf", "Cc", "Cs") and not c.isspace())


def _composed(cluster: str) -> str:
    """In NFKC, with ASCII digits."""
    if cluster.isascii():
        return cluster
    made = unicodedata.normalize("NFKC", cluster)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in made)


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
    """Case-folded, without what is written over, under or around a letter or digit."""
    if piece.isascii():
        return piece.lower()
    # "I" is the capital of dotless i as well
    apart = unicodedata.normalize("NFKD", piece.casefold().replace("\u0131", "i"))
    bare = "".join(c for c in apart if not _accent(c))
    return unicodedata.normalize("NFKC", bare.casefold())


def _accent(c: str) -> bool:
    # Below 10 are the marks that make another letter (Indic, kana), but for strokes through one.
    mark = unicodedata.combining(c)
    return mark >= 10 or mark == 1 or unicodedata.category(c) == "Me"


def find_all(text: str, value: str) -> Iterator[int]:
    """Every start of ``value``, those that overlap too, in time linear in both."""
    if not value or value not in text:
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
