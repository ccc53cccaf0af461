"""Counterfactual contexts: the same text with other secrets, or with none.

A *twin* has every secret replaced by a neutral token at the same positions; a *pair* has the
forbidden secrets resampled from values of the same field and token count, so that the two contexts
line up token by token. Where a derived value is allowed, resampling holds it fixed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from lcguard.categories import CATEGORIES
from lcguard.guards.detector import runs
from lcguard.records import TokenRecord, TokenSpan
from lcguard.tokens import Special

Key = tuple[str, int, str | None]


def forbidden_spans(record: TokenRecord, forbid: Sequence[str]) -> list[TokenSpan]:
    """Values of the forbidden categories."""
    return [s for s in record.spans if s.category in forbid]


def neutral_twin(record: TokenRecord, forbid: Sequence[str], neutral_id: int) -> tuple[int, ...]:
    """The context with each forbidden value overwritten by ``neutral_id``, token by token."""
    ids = list(record.ids)
    for span in forbidden_spans(record, forbid):
        ids[span.start : span.end] = [neutral_id] * (span.end - span.start)
    return tuple(ids)


def fixed_length_twin(
    record: TokenRecord, forbid: Sequence[str], neutral_id: int, length_tokens: int = 4
) -> tuple[int, ...]:
    """As ``neutral_twin``, but every value becomes ``length_tokens`` tokens: hides lengths too."""
    spans = sorted(forbidden_spans(record, forbid), key=lambda s: s.start)
    return replaced(record.ids, [(s.start, s.end, (neutral_id,) * length_tokens) for s in spans])


def found_twin(
    ids: Sequence[int],
    marks: Sequence[int],
    placeholder: str,
    special: Special,
    key: bytes = b"",
    length_tokens: int = 4,
) -> tuple[int, ...]:
    """The context with what a detector marked replaced; ``marks``: see ``GuardModule.marks``.

    ``key``: the segment's secret, for the placeholder ``surrogate``. Raises ``ValueError`` for a
    placeholder that is not known, and where there is no surrogate.
    """
    neutral = (special.neutral_id,)
    fill: dict[str, Callable[[Sequence[int], int], Sequence[int]]] = {
        "neutral": lambda value, category: neutral * len(value),
        "fixed_length": lambda value, category: neutral * length_tokens,
        "typed": lambda value, category: special.typed[category],
        "surrogate": lambda value, category: special.surrogate(category, value, key),
    }
    if placeholder not in fill:
        raise ValueError(f"placeholder {placeholder!r} is unknown: use {', '.join(fill)}")
    chosen = fill[placeholder]
    return replaced(ids, [(a, b, chosen(ids[a:b], c)) for a, b, c in runs(marks)])


def replaced(
    ids: Sequence[int], ranges: Iterable[tuple[int, int, Sequence[int]]]
) -> tuple[int, ...]:
    """The context with token ranges ``(start, end, by)``, in order, replaced; they may not overlap:
    of two that do, the second loses what the first has taken."""
    out: list[int] = []
    at = 0
    for start, end, by in ranges:
        if end > at:
            out += [*ids[at : max(at, start)], *by]
            at = end
    return (*out, *ids[at:])


def with_value(record: TokenRecord, span: TokenSpan, value: Sequence[int]) -> tuple[int, ...]:
    """The context with another value of as many tokens in a span, and in those spans of its
    category that hold the same tokens."""
    old, ids = record.ids[span.start : span.end], list(record.ids)
    for s in record.spans:
        if s.category == span.category and record.ids[s.start : s.end] == old:
            ids[s.start : s.end] = value
    return tuple(ids)


class ValuePool:
    """Values of each field by token count (and band), from which pairs are resampled."""

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self._by_key: dict[Key, list[tuple[int, ...]]] = defaultdict(list)
        self._by_length: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
        self._tokens: dict[str, list[int]] = defaultdict(list)
        bands: set[tuple[str, str]] = set()
        for record in records:
            for span, c in record.categorised():
                value, n = record.ids[span.start : span.end], span.end - span.start
                category = CATEGORIES[c]
                self._by_key[span.field, n, None].append(value)
                if span.band is not None:
                    self._by_key[span.field, n, span.band].append(value)
                    bands.add((category, span.band))
                self._by_length[category, n].append(value)
                self._tokens[category] += value

        self.bands = sorted(bands)
        """Derived values of secrets, as (category, band)."""

    def word(self, span: TokenSpan, words: int) -> int | None:
        """Which of a codebook's ``words`` stands for the span's band; None where it has none.

        Word 0 is the constant; bands share words where there are more of them than words.
        """
        band = (str(span.category), str(span.band))
        if span.band is None or words < 2 or band not in self.bands:
            return None
        return 1 + self.bands.index(band) % (words - 1)

    def draw(
        self, rng: random.Random, span: TokenSpan, *, hold_band: bool
    ) -> tuple[int, ...] | None:
        """Another value for the span, of as many tokens.

        Falls back from the field to the category, then to single tokens of the category: rare
        lengths still get a counterfactual. With ``hold_band`` there is no such fallback: a band of
        which the pool knows no value of that length gives None. Raises ``ValueError`` for a
        category without values.
        """
        n = span.end - span.start
        band = span.band if hold_band else None
        options = self._by_key.get((span.field, n, band), [])
        if len(options) < 2 and band is None:
            options = self._by_length.get((str(span.category), n), [])
        if len(options) >= 2 or (options and band is not None):
            return options[int(rng.random() * len(options))]
        if band is not None:
            return None
        tokens = self._tokens.get(str(span.category))
        if not tokens:
            raise ValueError(
                f"no value of category {span.category!r} to resample from; "
                "add training records that have it"
            )
        return tuple(rng.choice(tokens) for _ in range(n))

    def resample(
        self,
        rng: random.Random,
        record: TokenRecord,
        forbid: Sequence[str],
        derive: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """The pair: the context with every forbidden value redrawn."""
        ids = list(record.ids)
        for span in forbidden_spans(record, forbid):
            value = self.draw(rng, span, hold_band=span.category in derive)
            if value is not None:
                ids[span.start : span.end] = value
        return tuple(ids)

    def resample_one(
        self,
        rng: random.Random,
        record: TokenRecord,
        forbid: Sequence[str],
        derive: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """The context with one forbidden value, chosen at random, redrawn, and all others held."""
        spans = forbidden_spans(record, forbid)
        if not spans:
            return record.ids
        span = spans[int(rng.random() * len(spans))]
        value = self.draw(rng, span, hold_band=span.category in derive)
        return record.ids if value is None else with_value(record, span, value)
