"""Finds values in a text in whatever spelling they stand there.

    text = Spellings("SSN: **912\\u201155**\\n1029, call ADA  LONG")
    text.find("912-55-1029"), text.find("Ada Long")

Two spellings are one value if the same letters and digits come in the same order, in any case,
width, composition and accent, with anything between them that is neither; of a value that is mostly
signs (a password) the signs count too. A value is found inside a longer word, and where JSON, HTML
or a URL escapes its characters. Short values are therefore found more often than they are meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lcguard.normalise import Form, find_all, runs, skeleton, unspaced
from lcguard.unescape import unescaped

Range = tuple[int, int]
SHORTEST = 5
"""Letters and digits that a value needs to be looked for inside words too, where nobody named it
for this text: a shorter one is part of too many others."""


@dataclass(frozen=True)
class Key:
    """What is looked for instead of a value: its form without and with its signs."""

    bare: str
    """Empty where signs are most of the value."""
    signs: str

    @classmethod
    def of(cls, value: str) -> Key:
        """Raises ``ValueError`` for a value in which nothing is seen."""
        bare, signs = skeleton(value).text, unspaced(value).text
        if not signs:
            raise ValueError("nothing but white space")
        return cls(bare if 2 * len(bare) >= len(signs) else "", signs)


class Spellings:
    """A text, to be looked through for many values."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _readings(self) -> list[tuple[Form, Form]]:
        """Without and with signs, as the text stands and with its escapes read."""
        found = [(skeleton(self.text), unspaced(self.text))]
        if (read := unescaped(self.text)) is not None:
            found.append((skeleton(read.text).over(read), unspaced(read.text).over(read)))
        return found

    def find(self, *values: str | Key) -> list[Range]:
        """Character ranges of every occurrence of any of the values, in order.

        Those that overlap are one range, those that touch are not. Time is linear in the text for
        each length of value. Raises ``ValueError`` for a value in which nothing is seen.
        """
        keys = [Key.of(v) if isinstance(v, str) else v for v in values]
        found: set[Range] = set()
        for bare, signs in self._readings:
            for form, wanted in ((bare, {k.bare for k in keys}), (signs, {k.signs for k in keys})):
                found |= {form.origin(a, b) for a, b in runs(form.text, wanted)}
        return merged(found)

    def find_words(self, *keys: Key) -> list[Range]:
        """As ``find``, but only where no letter or digit stands right before or behind."""
        found: set[Range] = set()
        for bare, signs in self._readings:
            for form, wanted in ((bare, {k.bare for k in keys}), (signs, {k.signs for k in keys})):
                for value in wanted:
                    places = ((i, i + len(value)) for i in find_all(form.text, value))
                    found |= {form.origin(a, b) for a, b in places if self._is_word(form, a, b)}
        return merged(found)

    def _is_word(self, form: Form, start: int, end: int) -> bool:
        return self._parted(form, start) and self._parted(form, end)

    def _parted(self, form: Form, at: int) -> bool:
        """Whether a word may end between the characters before and at ``at``."""
        if not 0 < at < len(form.text):
            return True
        if not (form.text[at - 1].isalnum() and form.text[at].isalnum()):
            return True
        between = self.text[form.ends[at - 1] : form.starts[at]]
        return any(c.isspace() for c in between) or bool(unspaced(between).text)

    def forms(self) -> list[str]:
        """Every form of the text that a key's are looked for in."""
        return [form.text for reading in self._readings for form in reading]


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order; those that overlap as one."""
    out: list[Range] = []
    for start, end in sorted(ranges):
        if out and out[-1][1] > start:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out
