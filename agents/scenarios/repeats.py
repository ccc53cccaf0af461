"""Values that stand in a text again: what is hidden once and shown twice is not hidden.

A repeat is the same value however it is written (``lcguard.normalise``): in another case, width or
spacing, with other separators or none. It becomes a span of the value's category, guarded like it
and not scored again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from lcguard.agents.scenarios.offsets import inside_word
from lcguard.agents.scenarios.types import Record, Span
from lcguard.normalise import folded, occurrences, skeleton
from lcguard.tokens import REPEAT

SHORT: Final = 6
"""A value of fewer letters and digits is a repeat only as a word of its own: `12` is in `1290`."""


def cover_repeats(record: Record) -> tuple[Record, list[Span]]:
    """The record with a span for every repeat of a secret value, and these spans, in order.

    A repeat within a span of another category gets one too: the policy may forbid only its own.
    """
    known = {(s.category, s.start, s.end) for s in record.spans if s.category is not None}
    found: dict[tuple[str, int, int], Span] = {}
    form = skeleton(record.text)
    for span in record.spans:
        if span.category is None:
            continue
        short = len(skeleton(span.value).text) < SHORT
        for start, end in occurrences(record.text, span.value, form):
            if short and not _same_word(record.text, start, end, span.value):
                continue
            if not any(c == span.category and a <= start and end <= b for c, a, b in known):
                repeat = Span(start, end, REPEAT, span.category, record.text[start:end])
                found[span.category, start, end] = repeat
    spans = _outermost(list(found.values()))
    return replace(record, spans=(*record.spans, *spans)), spans


def _outermost(spans: list[Span]) -> list[Span]:
    """Without those that lie within another of their category."""
    return sorted(
        (
            s
            for s in spans
            if not any(
                o is not s and o.category == s.category and o.start <= s.start and s.end <= o.end
                for o in spans
            )
        ),
        key=lambda s: (s.start, s.end),
    )


def _same_word(text: str, start: int, end: int, value: str) -> bool:
    """Whether the place holds a word of its own, with the signs of the value: `4.5` is not `45`."""
    same = folded(text[start:end]).text.casefold() == folded(value).text.casefold()
    return same and not any(inside_word(text, i) for i in (start, end))
