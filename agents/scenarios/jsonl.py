"""A user's own records: one JSON object a line.

    {"text": "Ann Lee was billed 90 EUR.",
     "spans": [{"start": 0, "end": 7, "category": "person"}],
     "questions": [{"question": "How much was billed?", "answer": "90 EUR"},
                   {"question": "Who was billed?", "answer": "Ann Lee", "category": "person"}]}

(on one line). ``spans`` are the private values of the text, as character offsets with the end
exclusive; they may not overlap. ``category`` is one of ``lcguard.categories``, ``field`` a name of
your own (default: the category), ``value`` the text that the span must cover, checked where it is
given. What stands in the text again, in whatever spelling, is guarded like the span that it repeats
and not scored again. A question without category is the receiver's task; one with a
category counts as *allowed* where the policy does not forbid that category. ``id``, of a line or
of a question, is your own reference: a line's names its scenario (default: file name and line
number) and must be unique, a question's is not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lcguard.agents.scenarios.excerpts import secret_fields
from lcguard.agents.scenarios.files import (
    ScenarioError,
    ScenarioWarning,
    Text,
    check_new,
    read_lines,
)
from lcguard.agents.scenarios.offsets import Offsets, misread, untidy
from lcguard.agents.scenarios.repeats import cover_repeats
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Question, Record, Scenario, Span
from lcguard.categories import CATEGORIES
from lcguard.nearest import unknown
from lcguard.rule import Rule
from lcguard.tokens import REPEAT

SENDER: Final = "sender"
RECEIVER: Final = "receiver"
_CUT: Final = (
    "begins or ends inside a word or with white space; check its offsets, give `value` to have "
    "them checked"
)
_AGAIN: Final = "a span's value stands there again; guarded like it, and not scored again"


def _known(category: str) -> str:
    if category not in CATEGORIES:
        raise ValueError(unknown("category", category, CATEGORIES))
    return category


def _own(field: str) -> str:
    if field == REPEAT:
        raise ValueError("is the name of what repeats a value; use another")
    return field


_Category = Annotated[str, AfterValidator(_known)]
_Id = Text | None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LabelledSpan(_Model):
    """A value in a text, of any category."""

    start: Annotated[int, Field(ge=0)]
    end: int
    category: Text
    field: Annotated[Text, AfterValidator(_own)] | None = None
    value: Text | None = None


class _Span(LabelledSpan):
    category: _Category


class _Question(_Model):
    question: Text
    answer: Text
    category: _Category | None = None
    field: Text | None = None
    id: _Id = None


class _Line(_Model):
    text: Text
    spans: list[_Span]
    questions: list[_Question]
    id: _Id = None


def read_jsonl(path: Path, *, forbid: Sequence[str] = CATEGORIES) -> list[Scenario]:
    """One scenario a line: ``sender`` hands the text to ``receiver``.

    ``forbid`` holds the categories that the receiver may not learn. Warns (``ScenarioWarning``) of
    values that stand in a text again, and of spans that begin or end inside a word or with
    white space. Raises
    ``ScenarioError``, one line with file, line and key, where the file is missing or empty or a
    line is malformed, and ``ValueError`` where ``forbid`` names an unknown category.
    """
    unknown = [c for c in forbid if c not in CATEGORIES]
    if unknown:
        raise ValueError(f"forbid = {unknown[0]!r}: {CATEGORIES} are known; use some of those")
    edge = EdgeSpec(SENDER, RECEIVER, Rule.hiding(forbid))
    scenarios: dict[str, Scenario] = {}
    notes: dict[str, list[str]] = {_CUT: [], _AGAIN: []}
    for where, line in read_lines(path, _Line):
        name = line.id or f"{path.stem}-{where.rpartition(':')[2]}"
        check_new(where, "id", name, scenarios)
        spans = spans_of(where, line.text, line.spans)
        notes[_CUT] += _cut(where, line)
        record, repeats = cover_repeats(
            Record(name, "jsonl", "user", line.text, spans, _questions(line))
        )
        notes[_AGAIN] += [f"{where}: characters {s.start} to {s.end}" for s in repeats]
        agent = AgentSpec(SENDER, SENDER, (record,))
        scored = secret_fields([record]) if repeats else None
        scenarios[name] = Scenario(name, "jsonl", "user", (agent,), (edge,), secret_fields=scored)
    for kind, found in notes.items():
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            warnings.warn(f"{found[0]}: {kind}{others}", ScenarioWarning, stacklevel=2)
    return list(scenarios.values())


def _cut(where: str, line: _Line) -> Iterator[str]:
    """The spans that probably lie beside their value. Raises ``ScenarioError`` where the offsets
    are evidently counted in other units than characters."""
    offsets = [(s.start, s.end) for s in line.spans]
    for i, span in enumerate(offsets):
        if not untidy(line.text, span):
            continue
        if other := misread(line.text, offsets):
            units, moved = other
            raise ScenarioError(
                f"{where}: spans[{i}] reads {_shown(line.text, span)}, in {units} it would be "
                f"{_shown(line.text, moved[i])}: count characters, here start {moved[i][0]} and "
                f"end {moved[i][1]}"
            )
        yield f"{where}: spans[{i}] reads {_shown(line.text, span)}"


def _shown(text: str, span: Offsets) -> str:
    value = text[slice(*span)]
    return repr(value if len(value) <= 40 else value[:37] + "...")


def spans_of(where: str, text: str, spans: Sequence[LabelledSpan]) -> tuple[Span, ...]:
    """The values of a line that stands at ``where``. Raises ``ScenarioError`` for a span that is
    none of the text, or overlaps another."""
    n = len(text)
    for i, span in enumerate(spans):
        place = f"{where}: spans[{i}]"
        if span.start >= span.end:
            raise ScenarioError(
                f"{place}: start {span.start} is not before end {span.end}; end is exclusive, "
                "so it is at least start + 1"
            )
        if span.end > n:
            raise ScenarioError(
                f"{place}.end = {span.end}: the text has {n} characters; use at most {n}"
            )
        found = text[span.start : span.end]
        if span.value is not None and span.value != found:
            raise ScenarioError(f"{place}: {_mismatch(text, span)}")
        if not found.strip():
            raise ScenarioError(f"{place}: covers white space alone; point it at a value")
    order = sorted(range(len(spans)), key=lambda i: spans[i].start)
    for i, j in pairwise(order):
        if spans[i].end > spans[j].start:
            raise ScenarioError(
                f"{where}: spans[{j}].start = {spans[j].start}: overlaps spans[{i}], which "
                f"ends at {spans[i].end}; split or merge the two"
            )
    return tuple(
        Span(s.start, s.end, s.field or s.category, s.category, text[s.start : s.end])
        for s in spans
    )


def _mismatch(text: str, span: LabelledSpan) -> str:
    """Why ``value`` is not what the offsets cover, and where it is."""
    assert span.value is not None
    reads = f"value is {span.value!r}, the text reads {_shown(text, (span.start, span.end))}"
    at = text.find(span.value)
    if at < 0:
        return f"{reads}, and the value stands nowhere in it: write it as it stands there"
    return f"{reads}: the value stands at start {at}, end {at + len(span.value)}, in characters"


def _questions(line: _Line) -> tuple[Question, ...]:
    return tuple(
        Question(q.question, q.answer, q.field or q.category or "task", q.category)
        for q in line.questions
    )
