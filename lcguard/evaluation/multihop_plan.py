"""What one evaluation over several hops does; one YAML file with ``kind: multihop``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lcguard.agents.topology import Link
from lcguard.evaluation.plan import AttackSpec, GuardSpec, Plan, twice

Variant = Literal["per-agent", "full-system"]
Kind = Literal["chain", "hierarchy", "graph"]


@dataclass(frozen=True)
class TopologySpec:
    """A chain or hierarchy of so many agents, or a graph by its links."""

    name: str
    kind: Kind = "graph"
    agents: int = 0
    """Of a chain or hierarchy; a graph's follow from its links."""
    links: tuple[Link, ...] = ()
    relay: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "graph") != bool(self.links) or (self.kind != "graph") != bool(
            self.agents
        ):
            raise ValueError(
                f"topology {self.name!r}: a graph has links and no number of agents, a chain or "
                "hierarchy the other way round"
            )


@dataclass(frozen=True)
class HopGuard(GuardSpec):
    """A guard, used on every link."""

    variant: Variant = "per-agent"
    """``full-system``: trained on all segments of a path."""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.variant}"


@dataclass(frozen=True)
class GraphData:
    """Generated scenarios over each topology; attackers' and victims' share nothing."""

    seed: int = 3000
    train_scenarios: int = 400
    test_scenarios: int = 100
    min_fields: int = 3
    max_fields: int = 4
    filler: int = 1
    warm_records: int = 900
    """Ordinary single records on whose raw KV a decoder learns, for warm starts."""


@dataclass(frozen=True)
class CurvePlan:
    """Leakage against the number of hops and of agents; first seed only."""

    hops: int = 0
    """Longest chain, in hops; 0 makes no curve."""
    agents: tuple[int, ...] = ()
    """Sizes of the hierarchies."""
    guards: tuple[str, ...] = ()
    """Labels (``name/variant``)."""
    attack: str = ""
    """Name of the attack that is fitted once per guard."""
    train_scenarios: int = 120
    test_scenarios: int = 60


@dataclass(frozen=True)
class LatencyPlan:
    """Whole graph, one scenario at a time: text, raw KV and guarded KV in turn."""

    runs: int = 0
    context_tokens: int = 512
    """Every agent's context is filled up to so many."""


@dataclass(frozen=True)
class MultihopConfig(Plan):
    """Several hops: graphs of agents."""

    kind: Literal["multihop"] = "multihop"
    title: str = "LCGuard over several hops"
    data: GraphData = field(default_factory=GraphData)
    topologies: tuple[TopologySpec, ...] = ()
    guards: tuple[HopGuard, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    floor_options: dict[str, Any] = field(default_factory=dict)
    """Of the decoder that makes the blind floor, beside or in place of the attack's own."""
    run_all: tuple[str, ...] = ()
    """Guards (by name) on which every attack is run all the same, on the first topology with the
    first seed: an attack that recovers nothing there is no judge of a guard."""
    once: tuple[str, ...] = ()
    """Attacks (by name) that are run with the first seed only: the slow ones."""
    curves: CurvePlan = field(default_factory=CurvePlan)
    latency: LatencyPlan = field(default_factory=LatencyPlan)

    @property
    def floor_attack(self) -> AttackSpec:
        """The first fitted writer of values."""
        spec = next((a for a in self.attacks if a.attack == "decoder"), self.attacks[0])
        options = spec.options | self.floor_options
        return replace(spec, name=f"{spec.name}-blind", warm=False, options=options)

    @property
    def units(self) -> int:
        """Units at most: fewer are made where the first attack breaks a guard."""
        per_guard = 1 + len(self.attacks)
        curves = 4 * len(self.curves.guards) if self.curves.attack else 0
        per_graph = 1 + len(self.seeds) * (1 + len(self.guards) * per_guard)
        return len(self.topologies) * per_graph + curves

    def __post_init__(self) -> None:
        for kind, labels in (
            ("topologies", [t.name for t in self.topologies]),
            ("guards", [g.label for g in self.guards]),
            ("attacks", [a.name for a in self.attacks]),
        ):
            if not labels:
                raise ValueError(f"{kind} is empty; give at least one")
            if name := twice(labels):
                raise ValueError(f"{kind}: {name!r} stands twice")
        super().__post_init__()
        known = [a.name for a in self.attacks]
        for which, names, valid in (
            ("once", self.once, known),
            ("run_all", self.run_all, [g.name for g in self.guards]),
            ("curves.guards", self.curves.guards, [g.label for g in self.guards]),
            ("curves.attack", (self.curves.attack,) if self.curves.attack else (), known),
        ):
            for name in names:
                if name not in valid:
                    raise ValueError(f"{which}: {name!r} is not one of {', '.join(valid)}")
        if (self.curves.hops or self.curves.agents) and not self.curves.attack:
            raise ValueError("curves.attack is empty; name one of attacks")
