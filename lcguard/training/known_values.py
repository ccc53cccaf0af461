"""What the values of a field are like: draws of their law, and how well one guesses blind.

The certificate needs both of every secret that it looks at, of values with the secret's number of
tokens (the segment shows that), and must not learn them from the secret itself: from the generator
that made the records, or from other records.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lcguard.records import TokenRecord, TokenSpan
from lcguard.tokens import REPEAT

Ids = tuple[int, ...]
Sample = Callable[[str, str, random.Random], tuple[str, str | None] | None]
"""A value of a record type's field as text, and its band; None for a field that it does not know.
"""
FEWEST = 20
"""Known values, below which nothing is said of a law."""


@dataclass(frozen=True)
class Law:
    """Draws of the law of one field's values of one length."""

    values: Sequence[Ids]

    def guess(self, risk: float) -> float:
        """No value has a larger probability, but for a ``risk``: Clopper and Pearson's bound for
        the most frequent one, which came at least as often as the most probable one. 1 where too
        few are known."""
        from scipy.stats import beta  # half a second that most commands do not need

        n = len(self.values)
        if n < FEWEST:
            return 1.0
        top = Counter(self.values).most_common(1)[0][1]
        return 1.0 if top == n else float(beta.ppf(1 - risk, top + 1, n - top))


class KnownValues(Protocol):
    def of(self, record: TokenRecord, span: TokenSpan, hold_band: bool) -> Law:
        """What is known of a secret's values, given its band where that may be told."""
        ...


def written_otherwise(record: TokenRecord, span: TokenSpan) -> bool:
    """Whether the record may tell the value again in another spelling, which resampling would leave
    as it is: a repeat of the category that has the tokens of none of its values."""
    told = {record.ids[s.start : s.end] for s in record.spans if s.field != REPEAT}
    return any(
        s.field == REPEAT
        and s.category == span.category
        and record.ids[s.start : s.end] not in told
        for s in record.spans
    )


class RecordValues:
    """Of records that are not certified on, the values of a field by number of tokens."""

    def __init__(self, records: Sequence[TokenRecord]) -> None:
        self._found: dict[tuple[str, int, str | None], list[Ids]] = defaultdict(list)
        for record in records:
            for span, _ in record.categorised():
                value = record.ids[span.start : span.end]
                for band in {None, span.band}:
                    self._found[span.field, len(value), band].append(value)

    def of(self, record: TokenRecord, span: TokenSpan, hold_band: bool) -> Law:
        band = span.band if hold_band else None
        return Law(self._found.get((span.field, span.end - span.start, band), []))


class SampledValues:
    """Of the generator that makes the records: ``draws`` of each field of each record type."""

    def __init__(
        self,
        sample: Sample,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        draws: int = 5000,
        seed: int = 0,
    ) -> None:
        self._sample, self._encode, self._decode = sample, encode, decode
        self._draws, self._seed = draws, seed
        self._found: dict[tuple[str, str, str], dict[tuple[int, str | None], list[Ids]]] = {}

    def of(self, record: TokenRecord, span: TokenSpan, hold_band: bool) -> Law:
        text = self._decode(record.ids[span.start : span.end])
        lead = text[: len(text) - len(text.lstrip())]  # of the text around it
        key = record.record_type, span.field, lead
        if key not in self._found:
            self._found[key] = self._drawn(*key)
        band = span.band if hold_band else None
        return Law(self._found[key].get((span.end - span.start, band), []))

    def _drawn(self, kind: str, field: str, lead: str) -> dict[tuple[int, str | None], list[Ids]]:
        rng = random.Random(f"values/{self._seed}/{kind}/{field}")
        out: dict[tuple[int, str | None], list[Ids]] = defaultdict(list)
        for _ in range(self._draws):
            drawn = self._sample(kind, field, rng)
            if drawn is None:
                break
            value = tuple(self._encode(lead + drawn[0]))
            for band in {None, drawn[1]}:
                out[len(value), band].append(value)
        return out
