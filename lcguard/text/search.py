"""Where forbidden values stand in the strings and numbers of a value, split ones too.

What is named (``secrets``) and the terms of own categories are looked for in every spelling; what a
pattern or a detector finds in one place is then covered in all. A value may be split:

- over texts that are read as one (the parts of a message's content): everything is looked for
- over any strings of one message or one JSON value: values of at least ``SHORTEST`` letters and
  digits, since a shorter one would be found between others that merely follow each other
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lcguard.custom_categories import CustomCategory, SearchError, find_custom, find_learned
from lcguard.handoff.errors import HandoffError
from lcguard.normalise import Form, runs
from lcguard.text.json_text import spellings_of_number
from lcguard.text.walk import Spot
from lcguard.value_search import SHORTEST, Key, Range, Spellings, merged

Detect = Callable[[str], Iterable[Range]]
"""Character ranges of what is private in a text."""
SEARCH_S = 30.0
"""For all strings of one value together."""
_APART = " ;\n"
"""Between strings that no text joins: numbers on both sides of it are not one."""


@dataclass(frozen=True)
class Leaf:
    """A string or a number that is read."""

    text: str
    host: int
    """Which string of the value it stands in."""
    form: Form | None
    """From ``text`` to the characters of the host; None where they are the same."""
    spot: Spot
    depth: int = 0
    """JSON strings around it, within its host."""


@dataclass(frozen=True)
class Hit:
    """A value that was found."""

    value: str
    pieces: tuple[tuple[int, Range], ...]
    """The leaves that it stands in, with the range in each, in order."""
    firm: bool
    """Whether it is a named value or a term: those keep their bounds where others overlap."""
    category: str = ""
    """The own category that it belongs to."""


class Joined:
    """Strings one behind the other, as one text."""

    def __init__(self, leaves: Sequence[Leaf], which: Sequence[int], between: str) -> None:
        self._parts: list[tuple[int, int, int]] = []
        parts, at = [], 0
        for i in which:
            text = leaves[i].text
            self._parts.append((i, at, at + len(text)))
            parts.append(text)
            at += len(text) + len(between)
        self.text = between.join(parts)

    def hit(self, start: int, end: int, firm: bool, category: str = "") -> Hit:
        pieces = [
            (i, (max(start, a) - a, min(end, b) - a))
            for i, a, b in self._parts
            if max(start, a) < min(end, b)
        ]
        value = self.text[start:end]
        if len(pieces) == 1:
            ((i, (a, b)),) = pieces
            first = next(p for p in self._parts if p[0] == i)[1]
            value = self.text[first + a : first + b]
        return Hit(value, tuple(pieces), firm, category)


class Search:
    """What one edge forbids, to be looked for in many strings."""

    def __init__(
        self,
        secrets: Sequence[str],
        custom: Mapping[str, CustomCategory],
        detect: Detect | None,
    ) -> None:
        """Raises ``HandoffError`` (400) for a secret in which nothing is seen."""
        self.named: list[Key] = []
        for i, secret in enumerate(secrets):
            try:
                self.named.append(Key.of(secret))
            except ValueError as error:
                raise HandoffError(400, f"secrets[{i}] is {error}: name a text") from None
        self.custom, self._detect = custom, detect
        self._until_s = 0.0
        self._seen: dict[str, list[tuple[int, int, bool, str]]] = {}
        """What was found in a text: keys and values come again."""
        self.terms = [key for category in custom.values() for key in category.keys]

    def find(self, leaves: Sequence[Leaf]) -> list[Hit]:
        """Every hit. Raises ``HandoffError`` (400) for a pattern that takes too long."""
        self._until_s = time.monotonic() + SEARCH_S
        self._seen.clear()
        hits = [hit for i in range(len(leaves)) for hit in self._alone(leaves, i)]
        for which in _by(leaves, lambda leaf: leaf.spot.run):
            if len(which) > 1:
                for between in ("", "\n"):
                    hits += self._in_text(Joined(leaves, which, between))
        hits += self._detected(leaves)
        known = _known(hits)
        for i, leaf in enumerate(leaves) if known else ():
            for text in _readings(leaf):
                joined = Joined([replace(leaf, text=text)], [0], "")
                found = _places(joined, known, False)
                hits += (_at(i, leaf, text, hit) for hit in found)
        return [*hits, *self._split(leaves, known)]

    def _alone(self, leaves: Sequence[Leaf], i: int) -> Iterator[Hit]:
        leaf = leaves[i]
        for text in _readings(leaf):
            for hit in self._in_text(Joined([replace(leaf, text=text)], [0], "")):
                yield _at(i, leaf, text, hit)

    def _in_text(self, text: Joined) -> Iterator[Hit]:
        if text.text not in self._seen:
            self._seen[text.text] = list(self._places(text.text))
        yield from (text.hit(*place) for place in self._seen[text.text])

    def _places(self, text: str) -> Iterator[tuple[int, int, bool, str]]:
        """Start, end, whether the hit is firm, and its category."""
        if time.monotonic() > self._until_s:
            raise _too_slow()
        spellings = Spellings(text)
        yield from ((a, b, True, "") for a, b in spellings.find(*self.named))
        try:
            found = find_custom(spellings, self.custom)
        except SearchError as error:
            raise HandoffError(400, str(error)) from None
        for name, places in found.items():
            keys = self.custom[name].keys
            terms = spellings.find(*keys) if keys else []
            yield from ((a, b, True, name) for a, b in terms)
            yield from ((a, b, False, name) for a, b in places if (a, b) not in terms)

    def _detected(self, leaves: Sequence[Leaf]) -> Iterator[Hit]:
        """What the edge's detector and the heads of own categories find: in texts as they are read,
        and in all else of a message or a value at once, since the keys beside a value say what it
        is."""
        if self._detect is None and not any(c.heads for c in self.custom.values()):
            return
        for which in _by(leaves, lambda leaf: leaf.spot.run):
            yield from self._read(Joined(leaves, which, "\n"))
        for which in _by(leaves, lambda leaf: leaf.spot.group):
            rest = [i for i in which if leaves[i].spot.run is None]
            if rest:
                yield from self._read(Joined(leaves, rest, _APART))

    def _read(self, text: Joined) -> Iterator[Hit]:
        if time.monotonic() > self._until_s:
            raise _too_slow()
        try:
            found = find_learned(text.text, self.custom)
        except SearchError as error:
            raise HandoffError(400, str(error)) from None
        if self._detect is not None:
            found[""] = list(self._detect(text.text))
        for category, places in found.items():
            for a, b in merged(places):
                hit = text.hit(a, b, False, category)
                if hit.pieces and _seen(hit.value):
                    yield hit

    def _split(self, leaves: Sequence[Leaf], known: Mapping[str, set[Key]]) -> Iterator[Hit]:
        """Long values over any strings of a group."""
        named = {"": {k for k in self.named if len(k.bare or k.signs) >= SHORTEST}}
        terms = {name: set(category.keys) for name, category in self.custom.items()}
        for which in _by(leaves, lambda leaf: leaf.spot.group):
            strings = [i for i in which if not leaves[i].spot.is_number]
            if len(strings) > 1:
                joined = Joined(leaves, strings, "\n")
                yield from _places(joined, named, True)
                yield from _places(joined, terms, True)
                yield from _places(joined, known, False)

    def check(self, left: Iterable[str], hits: Iterable[Hit]) -> None:
        """Raises ``HandoffError`` (400) where a value can still be read in what is left."""
        found = [Key.of(hit.value) for hit in hits if not hit.firm]
        keys = [*self.named, *self.terms, *(k for k in found if len(k.bare) >= SHORTEST)]
        wanted = {form for key in keys for form in (key.bare, key.signs)}
        forms = "\0".join(form for text in left for form in Spellings(text).forms())
        if next(runs(forms, wanted), None) is not None:
            raise HandoffError(400, "a value that was to be hidden can still be read around it")


def _known(hits: Iterable[Hit]) -> dict[str, set[Key]]:
    """By category the values that patterns and detectors found, where they are long enough to be
    looked for everywhere."""
    out: dict[str, set[Key]] = {}
    for hit in hits:
        if not hit.firm and len((key := Key.of(hit.value)).bare) >= SHORTEST:
            out.setdefault(hit.category, set()).add(key)
    return out


def _places(text: Joined, keys: Mapping[str, set[Key]], firm: bool) -> Iterator[Hit]:
    spellings = Spellings(text.text)
    for category, some in keys.items():
        if some:
            yield from (text.hit(a, b, firm, category) for a, b in spellings.find(*some))


def _readings(leaf: Leaf) -> list[str]:
    return spellings_of_number(leaf.text) if leaf.spot.is_number else [leaf.text]


def _at(i: int, leaf: Leaf, text: str, hit: Hit) -> Hit:
    """A hit in leaf ``i``, read as ``text``; of a number always the whole: what is left of one is
    none."""
    if leaf.spot.is_number:
        return replace(hit, value=text, pieces=((i, (0, len(leaf.text))),))
    return replace(hit, pieces=((i, hit.pieces[0][1]),))


def _by(leaves: Sequence[Leaf], of: Callable[[Leaf], int | None]) -> list[list[int]]:
    """Leaves with the same number, in order."""
    found: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if (name := of(leaf)) is not None:
            found.setdefault(name, []).append(i)
    return list(found.values())


def _too_slow() -> HandoffError:
    return HandoffError(
        400, f"looking through the text took longer than {SEARCH_S:g} s: send less at once"
    )


def _seen(value: str) -> bool:
    return any(not c.isspace() for c in value)
