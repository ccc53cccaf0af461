"""Categories that a policy defines itself: by terms, by patterns that their values have, and by
examples from which a head learnt what they look like.

    categories:
      project_name: {terms: [Blue Heron, Grey Fox], patterns: ['PRJ-\\d{4}']}
      ship_name: {examples: ships.jsonl}     # and a head in ships.detector

A term is found in every spelling (``lcguard.value_search``): in any case, width, composition and
spacing, over line breaks, with zero-width characters in it, and where JSON, HTML or a URL escapes
it. One of fewer than ``SHORTEST`` letters and digits is found as a word alone: it is part of too
many others.

A pattern is looked for in any case, in the text as it stands, as it reads (``normalise.folded``)
and with its lines joined. Each has ``PATTERN_S`` seconds for one text: what takes longer is
refused, never passed.

Examples are no definition until a head was trained on them (``lcguard detect train``): without one,
or with one that was made for something else, a policy is refused.
"""

from __future__ import annotations

import shlex
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from lcguard.canonical import canonical_digest
from lcguard.categories import CATEGORIES
from lcguard.category_head import (
    MIN_RECALL,
    CategoryHead,
    default_folder,
    examples_digest,
    find_heads,
)
from lcguard.config import located
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


def _beside(path: str, info: ValidationInfo) -> str:
    """Relative to the policy's file, where it is one."""
    folder = (info.context or {}).get("folder")
    return path if folder is None else str(Path(folder) / path)


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

    examples: Annotated[str, Field(min_length=1), AfterValidator(_beside)] | None = None
    """Labelled texts, JSONL as ``lcguard label`` writes it, from which ``lcguard detect train``
    makes a head that finds further values. Relative paths start at the policy's file."""
    detector: Annotated[str, Field(min_length=1), AfterValidator(_beside)] | None = None
    """Folder of that head; by default that of ``examples`` with the ending ``.detector``. Without
    ``examples`` nothing holds it against them."""
    min_recall: Annotated[float, Field(ge=0, le=1)] = MIN_RECALL
    """Lower bound on the share of values found below which ``policy check`` warns."""

    _heads: tuple[CategoryHead, ...] = PrivateAttr(default=())
    _untrained: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _findable(self) -> CustomCategory:
        if not (self.terms or self.patterns or self.examples or self.detector):
            raise ValueError("nobody can find it: give terms, patterns or examples")
        return self

    @property
    def folder(self) -> Path | None:
        """Of its head; None without examples and detector."""
        if self.detector is not None:
            return Path(self.detector)
        return default_folder(Path(self.examples)) if self.examples is not None else None

    def load_head(self, name: str) -> None:
        """Reads the head that examples need. Raises ``ValueError`` in one line where there is none,
        or one that was made for something else."""
        if self.folder is None:
            return
        examples = Path(self.examples) if self.examples is not None else None
        given = shlex.quote(self.examples) if self.examples else "FILE"
        fix = (
            f"run `lcguard detect train --name {name} --examples {given} --out "
            f"{shlex.quote(str(self.folder))}`"
        )
        if examples is not None:
            examples_digest(examples)  # one that is not there is no reason to train
        if not self.folder.exists():
            raise ValueError(f"no head was trained in {self.folder}: {fix}")
        try:
            head = CategoryHead.read(self.folder)
        except ValueError as error:
            raise ValueError(f"{error}: {fix}") from None
        try:
            head.check(name, examples)
        except ValueError as error:
            raise ValueError(f"the head in {self.folder} {error}: {fix}") from None
        self._heads = (head,)

    @property
    def untrained(self) -> bool:
        """Whether a head that it needs was not read: then nothing may be guarded by it."""
        return self._untrained or (self.folder is not None and not self._heads)

    @property
    def heads(self) -> tuple[CategoryHead, ...]:
        """What finds values that are in no list."""
        return self._heads

    @classmethod
    def joined(cls, parts: Iterable[CustomCategory]) -> CustomCategory:
        """What belongs to any of them."""
        found = list(parts)
        made = cls.model_construct(
            terms=tuple(dict.fromkeys(t for part in found for t in part.terms)),
            patterns=tuple(dict.fromkeys(p for part in found for p in part.patterns)),
            min_recall=max(part.min_recall for part in found),
        )
        made._heads = tuple(dict.fromkeys(head for part in found for head in part.heads))
        made._untrained = any(part.untrained for part in found)
        return made

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the definition. Whoever has it can try terms: it is shown to nobody."""
        said: list[Any] = [sorted(set(self.terms)), sorted(set(self.patterns))]
        if self._heads:
            said.append(sorted(head.digest for head in self._heads))
        return canonical_digest(said)

    @property
    def size(self) -> dict[str, int]:
        """What may be shown of the definition."""
        counts = {"terms": len(self.terms), "patterns": len(self.patterns)}
        if self._heads:
            counts["examples"] = sum(head.card.n_examples for head in self._heads)
        return counts

    def covers(self, other: CustomCategory) -> bool:
        """Whether all of ``other`` belongs to this one, as far as can be told: another head may
        find more, or less."""
        return (
            {*other.terms} <= {*self.terms}
            and {*other.patterns} <= {*self.patterns}
            and {head.digest for head in other.heads} <= {head.digest for head in self._heads}
        )

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
        """Character ranges of its terms and patterns, in order, none overlapping; what its heads
        find says ``find_learned``.

        Raises ``SearchError`` for a pattern that takes too long, or matches nothing but a place,
        and where its head was not read.
        """
        if self.untrained:
            raise SearchError("examples: no head was read, which a policy's loading does")
        long, short = self._keys
        found = [*(text.find(*long) if long else ()), *(text.find_words(*short) if short else ())]
        for i, pattern in enumerate(self._patterns):
            try:
                found += _matches(pattern, text.text)
            except SearchError as error:
                raise SearchError(f"patterns[{i}] {error}") from None
        return merged(found)


def _new(name: str) -> str:
    if name in CATEGORIES:
        raise ValueError(f"{name!r} is a built-in category: choose another name for your own")
    return name


def _with_heads(own: dict[str, CustomCategory], info: ValidationInfo) -> dict[str, CustomCategory]:
    """Raises for one of which a head is missing, or another's."""
    for name, category in own.items() if not (info.context or {}).get("untrained") else ():
        try:
            category.load_head(name)
        except ValueError as error:
            key = "examples" if category.examples is not None else "detector"
            raise located((name, key), None, str(error)) from None
    return own


CustomCategories = Annotated[
    dict[Annotated[CategoryName, AfterValidator(_new)], CustomCategory], AfterValidator(_with_heads)
]
"""By name. A policy's; heads are read with it."""


def find_custom(text: Spellings, custom: Mapping[str, CustomCategory]) -> dict[str, list[Range]]:
    """Character ranges of each category's values. Raises ``SearchError`` naming the category."""
    out = {}
    for name, category in custom.items():
        try:
            out[name] = category.find(text)
        except SearchError as error:
            raise SearchError(f"categories.{name}.{error}") from None
    return out


def find_learned(text: str, custom: Mapping[str, CustomCategory]) -> dict[str, list[Range]]:
    """The same of what heads find, for the categories that have some: a small model reads the text
    once for all of them."""
    named = {name: category.heads for name, category in custom.items() if category.heads}
    try:
        found = find_heads(text, dict.fromkeys(head for heads in named.values() for head in heads))
    except ValueError as error:
        raise SearchError(f"categories.{', '.join(named)}.examples: {error}") from None
    return {
        name: merged(place for head in heads for place in found[head.card.category])
        for name, heads in named.items()
    }


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
