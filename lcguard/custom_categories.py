"""Categories that a policy defines itself: by terms, and by patterns that their values have.

    categories:
      project_name: {terms: [Blue Heron, Grey Fox], patterns: ['PRJ-\\d{4}']}

A term is found in every spelling (``lcguard.value_search``): in any case, width, composition and
spacing, over line breaks, with zero-width characters in it, and where JSON, HTML or a URL escapes
it. One of fewer than ``SHORTEST`` letters and digits is found as a word alone: it is part of too
many others.

A pattern is looked for in any case, in the text as it stands, as it reads (``normalise.folded``)
and with its lines joined. Each has ``PATTERN_S`` seconds for one text: what takes longer is
refused, never passed.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from lcguard.canonical import canonical_digest
from lcguard.normalise import folded, unspaced, unwrapped
from lcguard.unescape import unescaped
from lcguard.value_search import SHORTEST, Key, Range, Spellings, merged

PATTERN_S = 1.0
CategoryName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
"""Of a category, the library's or a policy's own."""


class SearchError(ValueError):
    """A text that could not be looked through for a category; one line that shows nothing of it."""


def _seen(term: str) -> str:
    try:
        Key.of(term)
    except ValueError as error:
        raise ValueError(f"{term!r} is {error}: name a text, or leave it out") from None
    return term


def _usable(pattern: str) -> str:
    try:
        found = _compiled(pattern).search("", timeout=PATTERN_S)
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if found:
        raise ValueError(f"{pattern!r} matches the empty text: write what is to be hidden")
    return pattern


def _later(examples: Any) -> None:
    raise ValueError("not supported yet: list the values as terms, or write their form as patterns")


def _compiled(pattern: str) -> Any:
    return regex.compile(unicodedata.normalize("NFC", pattern), regex.IGNORECASE)


class CustomCategory(BaseModel):
    """What belongs to a category. Terms and patterns are as secret as what they hide: no ``repr``
    shows them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    terms: tuple[Annotated[str, AfterValidator(_seen)], ...] = Field(default=(), repr=False)
    """Values, in any spelling."""
    patterns: tuple[Annotated[str, AfterValidator(_usable)], ...] = Field(default=(), repr=False)
    """Regular expressions of the package ``regex``; case is ignored but for ``(?-i:...)``."""

    examples: SkipJsonSchema[Annotated[Any, AfterValidator(_later)]] = Field(
        default=None, exclude=True, repr=False
    )
    """Refused: nothing is trained from examples yet."""

    @model_validator(mode="after")
    def _findable(self) -> CustomCategory:
        if not (self.terms or self.patterns):
            raise ValueError("nobody can find it: give terms or patterns")
        return self

    @classmethod
    def joined(cls, parts: Iterable[CustomCategory]) -> CustomCategory:
        """What belongs to any of them."""
        found = list(parts)
        terms = dict.fromkeys(t for part in found for t in part.terms)
        return cls(
            terms=tuple(terms),
            patterns=tuple(dict.fromkeys(p for part in found for p in part.patterns)),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the definition. Whoever has it can try terms: it is shown to nobody."""
        return canonical_digest([sorted(set(self.terms)), sorted(set(self.patterns))])

    @property
    def size(self) -> dict[str, int]:
        """What may be shown of the definition."""
        return {"terms": len(self.terms), "patterns": len(self.patterns)}

    def covers(self, other: CustomCategory) -> bool:
        """Whether all of ``other`` belongs to this one."""
        return {*other.terms} <= {*self.terms} and {*other.patterns} <= {*self.patterns}

    @cached_property
    def _keys(self) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
        """Of the terms that are found anywhere, and of those that are found as words."""
        keys = {Key.of(term) for term in self.terms}
        short = {key for key in keys if len(key.bare or key.signs) < SHORTEST}
        return tuple(keys - short), tuple(short)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What a text must not hold in any form once all terms are covered."""
        return self._keys[0]

    @cached_property
    def _patterns(self) -> list[Any]:
        return [_compiled(pattern) for pattern in self.patterns]

    def find(self, text: Spellings) -> list[Range]:
        """Character ranges of what belongs to it, in order, none overlapping.

        Raises ``SearchError`` for a pattern that takes too long, or matches nothing but a place.
        """
        long, short = self._keys
        found = [*(text.find(*long) if long else ()), *(text.find_words(*short) if short else ())]
        for i, pattern in enumerate(self._patterns):
            try:
                found += _matches(pattern, text.text)
            except SearchError as error:
                raise SearchError(f"patterns[{i}] {error}") from None
        return merged(found)


def find_custom(text: Spellings, custom: Mapping[str, CustomCategory]) -> dict[str, list[Range]]:
    """Character ranges of each category's values. Raises ``SearchError`` naming the category."""
    out = {}
    for name, category in custom.items():
        try:
            out[name] = category.find(text)
        except SearchError as error:
            raise SearchError(f"categories.{name}.{error}") from None
    return out


def _matches(pattern: Any, text: str) -> Iterator[Range]:
    until_s = time.monotonic() + PATTERN_S
    for form in (None, unescaped(text)):
        inner = text if form is None else form.text
        for made in (None, folded(inner), unwrapped(inner)):
            for start, end in _spans(pattern, inner if made is None else made.text, until_s):
                if made is not None:
                    start, end = made.origin(start, end)
                if form is not None:
                    start, end = form.origin(start, end)
                if not unspaced(text[start:end]).text:
                    raise SearchError("matches white space alone: write what is to be hidden")
                yield start, end


def _spans(pattern: Any, text: str, until_s: float) -> Iterator[Range]:
    # the interpreter's lock is not held meanwhile: whoever waits for an answer is served
    left_s = max(1e-3, until_s - time.monotonic())
    try:
        for match in pattern.finditer(text, timeout=left_s, concurrent=True):
            start, end = match.span()
            if start == end:
                raise SearchError("matches a place without a character: write what is to be hidden")
            yield start, end
            if time.monotonic() > until_s:
                raise TimeoutError
    except TimeoutError:
        raise SearchError(
            f"took longer than {PATTERN_S:g} s on this text: write it so that it does not "
            "backtrack (no (a+)+)"
        ) from None
