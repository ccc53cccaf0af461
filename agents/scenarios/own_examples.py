"""Examples of a category of a user's own: labelled texts, one JSON object a line, as ``lcguard
label`` writes them and ``jsonl`` reads them; here a span may be of any category.

    {"text": "Blue Heron ships in May.", "spans": [{"start": 0, "end": 10, "category": "project"}]}

A text without a span of the category is an example of what does not belong to it. A value that
stands in its text again, in whatever spelling, belongs to it there too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from lcguard.agents.scenarios.files import ScenarioError, Text, read_lines
from lcguard.agents.scenarios.jsonl import LabelledSpan, spans_of
from lcguard.categories import CATEGORIES
from lcguard.custom_categories import CustomCategory
from lcguard.nearest import unknown
from lcguard.normalise import skeleton
from lcguard.value_search import Range, Spellings

MIN_TEXTS, MIN_VALUES = 20, 10
"""With the category, and different ones: from fewer nothing is learnt that can be measured."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Text
    spans: list[LabelledSpan]
    questions: list[Any] = []
    id: Text | None = None


@dataclass(frozen=True)
class OwnExample:
    """A text, and where values of the category stand."""

    text: str
    values: tuple[Range, ...]
    """As labelled: those that count."""
    repeats: tuple[Range, ...] = ()
    """Where they stand again."""

    def named(self) -> Iterator[tuple[Range, str]]:
        """Each place with its value, in one spelling for all."""
        for a, b in sorted((*self.values, *self.repeats)):
            yield (a, b), skeleton(self.text[a:b]).text or self.text[a:b]


def read_examples(path: Path, category: str, known: Collection[str] = ()) -> list[OwnExample]:
    """All texts of a file.

    Args:
        known: further categories that a span may have, beside the library's.

    Raises ``ScenarioError`` in one line for a file or a line that cannot be used, a category that
    nobody knows, and for too few texts or values to learn from.
    """
    names = (*CATEGORIES, category, *known)
    out: list[OwnExample] = []
    for where, line in read_lines(path, _Line):
        spans = spans_of(where, line.text, line.spans)
        for i, span in enumerate(spans):
            if span.category not in names:
                said = unknown("category", str(span.category), names)
                raise ScenarioError(f"{where}: spans[{i}].{said}")
        values = tuple((s.start, s.end) for s in spans if s.category == category)
        out.append(OwnExample(line.text, values, _repeats(line.text, values)))
    texts = sum(bool(e.values) for e in out)
    values_ = {name for e in out for _, name in e.named()}
    if texts < MIN_TEXTS or len(values_) < MIN_VALUES:
        raise ScenarioError(
            f"{path}: {texts} texts with {len(values_)} different values of {category!r}: give at "
            f"least {MIN_TEXTS} texts with {MIN_VALUES} values, better some hundred"
        )
    return out


def _repeats(text: str, values: tuple[Range, ...]) -> tuple[Range, ...]:
    if not values:
        return ()
    terms = CustomCategory(terms=tuple({text[a:b] for a, b in values}))
    again = terms.find(Spellings(text))
    return tuple(r for r in again if all(r[1] <= a or b <= r[0] for a, b in values))
