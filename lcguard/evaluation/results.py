"""``report.json`` as types: what an evaluation writes, and all that shows it reads.

Every figure may be None, which is *not measured*; what is not finite is read as that. A key that
this version does not know is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lcguard.evaluation.figures import Count, Figure, Interval, readable

SCHEMA_VERSION = 1
LIST = "100"
"""The list of candidates that a verdict looks at."""

_List = BeforeValidator(lambda v: [] if v is None else v)
_Dict = BeforeValidator(lambda v: {} if v is None else v)


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, found: Any) -> Any:
        return readable(found)

    @classmethod
    def of(cls, found: Self | Mapping[str, Any]) -> Self:
        """``found`` as this type. Raises ``ValueError`` where it cannot be."""
        return found if isinstance(found, cls) else cls.model_validate(found)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: what was given, not what follows by default."""
        return self.model_dump(mode="json", exclude_unset=True)


class AttackFigures(Part):
    """What one fresh attack recovers."""

    asr: Figure = None
    ci: Interval = None
    token_accuracy: Figure = None
    ce_gap_nats: Figure = None
    """Nats a secret that the attack knows beyond the blind floor."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, found: Any) -> Any:
        """The ASR alone is enough."""
        return found if isinstance(found, Mapping | AttackFigures) else {"asr": found}


class CategoryFigures(Part):
    asr: Figure = None
    wilson: Interval = None
    bootstrap: Interval = None
    floor: Figure = None
    ceiling: Figure = None
    n: Count = None


class ListFigures(Part):
    """Of the attacker who chooses from lists of one size."""

    asr: Figure = None
    ci: Interval = None
    floor: Figure = None
    """Chance: 1 over the candidates really in the list."""
    blind: Figure = None
    """The same attack on segments of other records."""
    rank_median: Figure = None
    nats: Figure = None
    n: Count = None
    shorter: Figure = None
    by_category: Annotated[dict[str, CategoryFigures], _Dict] = {}


class Likelihood(Part):
    """By the size of the list, as text."""

    length_nats: Figure = None
    """What the value's number of tokens alone tells."""
    __pydantic_extra__: dict[str, ListFigures] = Field(init=False)

    @property
    def sizes(self) -> dict[str, ListFigures]:
        return self.__pydantic_extra__ or {}


class Counts(Part):
    """How often each outcome occurred."""

    success: Count = None
    resisted: Count = None
    error: Count = None
    not_applicable: Count = None


class Certificate(Part):
    """What one draw of a segment can tell at most, in nats."""

    mean_nats: Figure = None
    upper_nats: Figure = None
    median_nats: Figure = None
    p99_nats: Figure = None
    max_nats: Figure = None
    raw_nats: Figure = None
    entropy_nats: Figure = None
    asr_ceiling: Figure = None
    level: Figure = None
    blind_guess: Figure = None
    vacuous: bool = False
    n_pairs: Count = None


class Recall(Part):
    """Values that a detector finds whole."""

    found: Count = None
    total: Count = None
    recall: Figure = None
    recall_lower: Figure = None
    """Clopper and Pearson's one-sided bound."""


class Detection(Recall):
    """What a guard finds that is not told, and what it hides beside."""

    level: Figure = None
    task_spans: Count = None
    task_touched: Figure = None
    """Share of values that no policy forbids of which any token is hidden."""
    tokens_flagged: Figure = None
    categories: Annotated[dict[str, Recall], _Dict] = {}
    blind_guess: Figure = None
    asr_ceiling: Figure = None
    """What no attacker exceeds on values like these: a missed one counts as recovered."""


class BestFigures(Part):
    """Of the attack that recovers most on an edge or a path."""

    asr: Figure = None
    ci: Interval = None
    attack: str | None = None


class Composed(Part):
    """Secrets of two parts that two agents hold."""

    edge_max: Figure = None
    graph: Figure = None
    gap: Figure = None
    floor: Figure = None
    secrets: Count = None


class GuardRow(Part):
    """One guard; over several hops one guard on one topology."""

    guard: str = "?"
    topology: str | None = None
    variant: str | None = None
    utility: Figure = None
    utility_vanilla: Figure = None
    utility_relative: Figure = None
    utility_kept: Figure = None
    utility_teacher_forced: Figure = None
    allowed_accuracy: Figure = None
    asr_train: Figure = None
    asr_fresh: Figure = None
    asr_fresh_ci: Interval = None
    asr_fresh_best: str | None = None
    asr_fresh_by_attack: Annotated[dict[str, AttackFigures], _Dict] = {}
    asr_injection: Figure = None
    likelihood: Annotated[Likelihood, _Dict] = Likelihood()
    floor: Figure = None
    floor_ci: Interval = None
    ceiling: Figure = None
    advantage: Figure = None
    any_of_k: Figure = None
    counts: Counts | None = None
    asr_by_category: Annotated[dict[str, CategoryFigures], _Dict] = {}
    latency_ms: Annotated[dict[str, Figure], _Dict] = {}
    bytes_share: Figure = None
    certificate: Certificate | None = None
    detection: Detection | None = None
    """Of guards that find values themselves."""
    quick: bool = False
    """Of a quick run: too little was done to say anything good of the guard."""
    claim: str | None = None
    note: str | None = None
    guard_digest: str | None = None
    # over several hops
    utility_by_edge: Annotated[dict[str, Figure], _Dict] = {}
    asr_edge_max: Figure = None
    asr_by_edge: Annotated[dict[str, BestFigures], _Dict] = {}
    asr_by_path: Annotated[dict[str, BestFigures], _Dict] = {}
    asr_graph: Figure = None
    asr_graph_ci: Interval = None
    asr_graph_best: str | None = None
    asr_graph_by_attack: Annotated[dict[str, Figure], _Dict] = {}
    gap: Figure = None
    composed: Annotated[Composed, _Dict] = Composed()
    seeds: int | None = None
    errors: Count = None
    latency_vs_text: Figure = None
    latency: Annotated[dict[str, Figure], _Dict] = {}

    @property
    def label(self) -> str:
        """The guard's name; over several hops with its topology and variant."""
        return " ".join(x for x in (self.topology, self.guard, self.variant) if x)

    @property
    def headline(self) -> tuple[float | None, tuple[float, float] | None]:
        """Fresh ASR with its interval; over several hops, what the whole graph gives away."""
        if self.topology is None:
            return self.asr_fresh, self.asr_fresh_ci
        return self.asr_graph, self.asr_graph_ci

    @property
    def utility_share(self) -> float | None:
        """Utility relative to the unguarded receiver; from the two scores where it is not given."""
        if self.utility_relative is not None:
            return self.utility_relative
        if self.utility is None or not self.utility_vanilla:
            return None
        return self.utility / self.utility_vanilla

    @property
    def listed(self) -> ListFigures:
        """Of the attacker who chooses from ``LIST`` candidates; empty where not measured."""
        return self.likelihood.sizes.get(LIST, ListFigures())


class PolicyRow(Part):
    """The chosen guard under another policy."""

    policy: str = "?"
    guard: str = "?"
    forbidden: Annotated[tuple[str, ...], _List] = ()
    utility: Figure = None
    utility_vanilla: Figure = None
    allowed_accuracy: Figure = None
    allowed_accuracy_vanilla: Figure = None
    asr_forbidden: Figure = None
    asr_forbidden_ci: Interval = None
    asr_forbidden_by_attack: Annotated[dict[str, Figure], _Dict] = {}
    floor: Figure = None
    likelihood: Annotated[Likelihood, _Dict] = Likelihood()
    counts: Counts | None = None

    @property
    def listed(self) -> ListFigures:
        return self.likelihood.sizes.get(LIST, ListFigures())


class DerivedRow(Part):
    """Derived answers of one category whose exact values are forbidden."""

    guard: str = "?"
    policy: str = "?"
    question: str = "?"
    source_category: str = "?"
    accuracy: Figure = None
    accuracy_vanilla: Figure = None
    asr_exact: Figure = None
    asr_exact_ci: Interval = None
    asr_exact_best_guess: Figure = None
    n: Count = None


class Token(Part):
    text: str = ""
    withheld: Figure = None
    """Share of its entries, 0 to 1."""
    category: str | None = None


class Context(Part):
    """One context, token by token."""

    title: str | None = None
    guard: str = "?"
    policy: str = "?"
    tokens: Annotated[tuple[Token, ...], _List] = ()


class HopPoint(Part):
    guard: str
    hops: int
    utility: Figure = None
    utility_vanilla: Figure = None
    asr_edge: Figure = None
    asr_path: Figure = None


class AgentPoint(Part):
    guard: str
    agents: int
    utility: Figure = None
    utility_vanilla: Figure = None
    asr_graph: Figure = None
    asr_composed: Figure = None
    composed_secrets: int = 0


class CurvePoints(Part):
    """Leakage against the number of hops of a chain, and of agents of a hierarchy."""

    hops: tuple[HopPoint, ...] = ()
    agents: tuple[AgentPoint, ...] = ()


class Errors(Part):
    attempts: int
    budget: int
    exceeded: bool


class Report(Part):
    """A whole report, its manifest included."""

    schema_version: int = SCHEMA_VERSION
    title: str | None = None
    created: str | None = None
    command: str | None = None
    seeds: Annotated[tuple[int, ...], _List] = ()
    git: Annotated[dict[str, Any], _Dict] = {}
    python: str | None = None
    packages: Annotated[dict[str, str], _Dict] = {}
    hardware: Annotated[dict[str, Any], _Dict] = {}
    hashes: Annotated[dict[str, Any], _Dict] = {}
    """Of configuration, code, data and guards."""
    resumed: Annotated[tuple[dict[str, Any], ...], _List] = ()
    """Later starts of the run: when, by which command, with which code."""
    model: Annotated[dict[str, Any], _Dict] = {}
    data: Annotated[dict[str, Any], _Dict] = {}
    journal: Annotated[dict[str, int], _Dict] = {}
    errors: Errors | None = None
    results: Annotated[tuple[GuardRow, ...], _List] = ()
    policies: Annotated[tuple[PolicyRow, ...], _List] = ()
    derived: Annotated[tuple[DerivedRow, ...], _List] = ()
    length_channel: dict[str, Figure] | None = None
    explained: Annotated[tuple[Context, ...], _List] = ()
    curves: CurvePoints = CurvePoints()
    notes: Annotated[tuple[str, ...], _List] = ()

    @property
    def over_graphs(self) -> bool:
        """Is it one over several hops?"""
        return any(row.topology is not None for row in self.results)


def report_schema() -> dict[str, Any]:
    """JSON Schema of ``report.json``."""
    return Report.model_json_schema()
