"""One scenario type for every source: the generator, AgentLeak, a user's own file.

A scenario has agents, each with private records; a record is a text with labelled spans and
questions about it. Which spans are secrets is not a property of the record but of the *edge*: a
policy forbids categories to an audience.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lcguard.handoff.names import EdgeName
from lcguard.rule import Rule

QuestionKind = Literal["direct", "derived", "absent"]


@dataclass(frozen=True)
class Span:
    """A value in a record's text."""

    start: int
    """Character offset of the value's first character."""
    end: int
    field: str
    category: str | None
    """None: a task value, never a secret."""
    value: str
    band: str | None = None
    """The derived value, where the field has one: resampling may hold it fixed."""


@dataclass(frozen=True)
class Question:
    """What a receiver may be asked about a record."""

    text: str
    answer: str
    field: str
    category: str | None
    """Category of the field that the answer comes from."""
    kind: QuestionKind = "direct"


@dataclass(frozen=True)
class Record:
    """A private text that one agent has read."""

    record_id: str
    record_type: str
    vertical: str
    text: str
    spans: tuple[Span, ...]
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        for span in self.spans:
            if self.text[span.start : span.end] != span.value:
                raise ValueError(
                    f"record {self.record_id}: span {span.field} at {span.start}:{span.end} reads "
                    f"{self.text[span.start : span.end]!r}, not {span.value!r}"
                )


@dataclass(frozen=True)
class AgentSpec:
    """An agent of the scenario and the records that it alone has read."""

    name: str
    role: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class EdgeSpec:
    """A hop: ``audience`` receives what ``source`` publishes."""

    source: str
    audience: str
    rule: Rule

    @property
    def name(self) -> EdgeName:
        return EdgeName(self.source, self.audience)


@dataclass(frozen=True)
class Composition:
    """A secret that no single record holds: who somebody is, in one agent's record, and something
    sensitive about the same case in another's (arXiv 2509.14284)."""

    identifier: tuple[str, str]
    """Agent and field."""
    attribute: tuple[str, str]
    """Agent and field."""
    join: str
    """The value that both records hold and that may be known, such as a case reference."""


@dataclass(frozen=True)
class Scenario:
    scenario_id: str
    source: str
    vertical: str
    agents: tuple[AgentSpec, ...]
    edges: tuple[EdgeSpec, ...]
    task_fields: tuple[str, ...] | None = None
    """Fields that the task needs; None: every field without a category."""
    secret_fields: tuple[str, ...] | None = None
    """Fields to protect; None: every field of a forbidden category."""
    not_applicable: tuple[str, ...] = ()
    """Fields that the source lists but no record holds: counted, never scored."""
    compositions: tuple[Composition, ...] = ()

    def hops(self) -> Iterable[tuple[EdgeSpec, Record]]:
        """Every record with the edge over which it is handed on."""
        records = {agent.name: agent.records for agent in self.agents}
        for edge in self.edges:
            for record in records[edge.source]:
                yield edge, record


@dataclass(frozen=True)
class Hop:
    """The unit of training and evaluation: one record crossing one edge."""

    scenario_id: str
    edge: EdgeSpec
    record: Record
    task_fields: tuple[str, ...] | None = None
    secret_fields: tuple[str, ...] | None = None

    @property
    def edge_name(self) -> str:
        return str(self.edge.name)

    def is_task(self, question: Question) -> bool:
        """True for a question that the receiver is for."""
        if question.kind == "absent" or question.category in self.edge.rule.forbid:
            return self.task_fields is not None and question.field in self.task_fields
        if self.task_fields is not None:
            return question.field in self.task_fields
        return question.category is None

    def is_secret(self, span: Span) -> bool:
        """True for a value that the edge forbids."""
        if span.category is None or span.category not in self.edge.rule.forbid:
            return False
        return self.secret_fields is None or span.field in self.secret_fields


def hops_of(scenarios: Iterable[Scenario]) -> list[Hop]:
    """All hops of the scenarios, in order."""
    return [
        Hop(s.scenario_id, edge, record, s.task_fields, s.secret_fields)
        for s in scenarios
        for edge, record in s.hops()
    ]
