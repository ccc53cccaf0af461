"""A user's own records: one JSON object a line.

    {"text": "Ann Lee was billed 90 EUR.",
     "spans": [{"start": 0, "end": 7, "category": "person"}],
     "questions": [{"question": "How much was billed?", "answer": "90 EUR"},
                   {"question": "Who was billed?", "answer": "Ann Lee", "category": "person"}]}

(on one line). ``spans`` are the private values of the text, as character offsets with the end
exclusive; they may not overlap. ``category`` is one of ``lcguard.categories``, ``field`` a name of
your own (default: the category). A question without category is the receiver's task; one with a
category counts as *allowed* where the policy does not forbid that category. ``id``, of a line or
of a question, is your own reference: a line's names its scenario (default: file name and line
number) and must be unique, a question's is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from lcguard.agents.scenarios.lines import ScenarioError, read_lines
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Question, Record, Scenario, Span
from lcguard.categories import CATEGORIES

SENDER: Final = "sender"
RECEIVER: Final = "receiver"


def _known(category: str) -> str:
    if category not in CATEGORIES:
        raise ValueError(f"unknown category; use one of {', '.join(CATEGORIES)}")
    return category


_Category = Annotated[str, AfterValidator(_known)]
_Text = Annotated[str, StringConstraints(min_length=1)]
_Id = Annotated[str, StringConstraints(min_length=1)] | None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Span(_Model):
    start: Annotated[int, Field(ge=0)]
    end: int
    category: _Category
    field: _Text | None = None


class _Question(_Model):
    question: _Text
    answer: _Text
    category: _Category | None = None
    field: _Text | None = None
    id: _Id = None


class _Line(_Model):
    text: _Text
    spans: list[_Span]
    questions: list[_Question]
    id: _Id = None


def read_jsonl(path: Path, *, forbid: Sequence[str] = CATEGORIES) -> list[Scenario]:
    """One scenario a line: ``sender`` hands the text to ``receiver``.

    ``forbid`` holds the categories that the receiver may not learn. Raises ``ScenarioError``, one
    line with file, line and key, where the file is missing or empty or a line is malformed, and
    ``ValueError`` where ``forbid`` names an unknown category.
    """
    unknown = [c for c in forbid if c not in CATEGORIES]
    if unknown:
        raise ValueError(f"forbid = {unknown[0]!r}: {CATEGORIES} are known; use some of those")
    edge = EdgeSpec(SENDER, RECEIVER, tuple(c for c in CATEGORIES if c in forbid))
    scenarios: dict[str, Scenario] = {}
    for where, line in read_lines(path, _Line):
        name = line.id or f"{path.stem}-{where.rpartition(':')[2]}"
        if name in scenarios:
            raise ScenarioError(f"{where}: id = {name!r}: used before; make it unique")
        spans = _spans(where, line)
        record = Record(name, "jsonl", "user", line.text, spans, _questions(line))
        agent = AgentSpec(SENDER, SENDER, (record,))
        scenarios[name] = Scenario(name, "jsonl", "user", (agent,), (edge,))
    return list(scenarios.values())


def _spans(where: str, line: _Line) -> tuple[Span, ...]:
    n = len(line.text)
    for i, span in enumerate(line.spans):
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
        if not line.text[span.start : span.end].strip():
            raise ScenarioError(f"{place}: covers white space alone; point it at a value")
    order = sorted(range(len(line.spans)), key=lambda i: line.spans[i].start)
    for i, j in pairwise(order):
        if line.spans[i].end > line.spans[j].start:
            raise ScenarioError(
                f"{where}: spans[{j}].start = {line.spans[j].start}: overlaps spans[{i}], which "
                f"ends at {line.spans[i].end}; split or merge the two"
            )
    return tuple(
        Span(s.start, s.end, s.field or s.category, s.category, line.text[s.start : s.end])
        for s in line.spans
    )


def _questions(line: _Line) -> tuple[Question, ...]:
    return tuple(
        Question(q.question, q.answer, q.field or q.category or "task", q.category)
        for q in line.questions
    )
