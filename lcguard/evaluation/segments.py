"""What crosses the hops of a topology, as evaluation asks for it.

An attacker publishes records of his own through the frozen guard and fits on what comes out; a
victim's segments are what he is judged by. ``Segments`` is one topology with both sides' records:
``hop_segments`` over a chain of two agents, ``graph_segments`` over any graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lcguard.evaluation.outcomes import Kind
from lcguard.evaluation.plan import GuardSpec, PolicySpec
from lcguard.protocols import AttackData
from lcguard.records import TokenQuestion, TokenRecord

Side = Literal[0, 1]
ATTACKER: Side = 0
VICTIM: Side = 1


def noise_seed(seed: int, side: Side) -> int:
    """The victims' noise is not the attackers'."""
    return seed * 1_000_003 + side * 500_009


@dataclass(frozen=True)
class Observed:
    """What attackers get of one side's segments, and whose secrets each row holds."""

    single: AttackData
    """Every segment of every link, as if received alone: B = links x scenarios."""
    records: tuple[TokenRecord, ...]
    """Of the rows of ``single``."""
    joint: AttackData | None = None
    """All distinct segments of a scenario behind each other: B = scenarios. None over one hop."""
    owners: tuple[tuple[TokenRecord, ...], ...] = ()
    """Of the rows of ``joint``, part by part."""


@dataclass(frozen=True)
class Answer:
    """A question to an audience about what was handed to it."""

    record: TokenRecord
    question: TokenQuestion
    name: str
    """Tells the record's questions apart."""
    kind: Kind
    right: bool
    score: float | None = None


class Segments(ABC):
    """One topology with the attackers' and the victims' records on it."""

    name: str
    """Of the topology."""
    several: ClassVar[bool] = True
    """False over one hop: its segment is all that an attack on several together could read."""
    replies: bool = False
    """True where an answer counts by what it says, not by exact match of the bare value."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a unit of the journal hangs on beside the plan."""

    @abstractmethod
    def prepare(self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int) -> None:
        """Makes here what forked children are to share."""

    @abstractmethod
    def observed(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int, side: Side
    ) -> Observed:
        """One side's segments behind a guard; None is no guard, or each record's own policy."""

    @abstractmethod
    def answers(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> Iterator[Answer]:
        """The victims' audiences, questioned."""

    @abstractmethod
    def unguarded(self) -> AttackData:
        """Ordinary pairs of the attackers' own on raw KV: what a warm start is fitted on."""

    def secrets(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> Mapping[str, TokenRecord]:
        """The victims' records by the row of ``Observed.single`` that they are."""
        seen = self.observed(guard, policy, seed, VICTIM)
        return dict(zip(seen.single.record_ids, seen.records, strict=True))
