"""Leakage against the number of hops and of agents: one fitted attack per guard, many sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Topology
from lcguard.evaluation.graph_segments import GraphSegments, topology_of
from lcguard.evaluation.leakage import compose, held, union
from lcguard.evaluation.multihop_plan import HopGuard, Kind, MultihopConfig, TopologySpec
from lcguard.evaluation.outcomes import Attempt
from lcguard.evaluation.plan import GuardSpec, PolicySpec
from lcguard.evaluation.runner import Case, Runner
from lcguard.evaluation.segments import Answer
from lcguard.evaluation.statistics import asr, best_attack


class CurveSegments(GraphSegments):
    """The largest graph of a curve, and those cut from it; its audiences are questioned under the
    noise of the seed itself."""

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"curve": True}

    def answers(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> Iterator[Answer]:
        return self.answered(guard, seed)

    def cut(self, n: int) -> CurveSegments:
        """The hierarchy of the first ``n - 1`` workers, over the same records."""
        spec = TopologySpec(f"hierarchy-{n}", "hierarchy", n)
        victims = [_part(s, topology_of(spec)) for s in self.sides[1]]
        return CurveSegments(self.model, self.guards, spec, self.data, ([], victims))


@dataclass(frozen=True)
class Curves:
    """Both curves of a plan."""

    runner: Runner
    plan: MultihopConfig

    def points(self) -> dict[str, list[dict[str, Any]]]:
        """``hops`` and ``agents``: a list of points for each guard; empty where not wanted."""
        wanted = self.plan.curves
        chosen = [g for g in self.plan.guards if g.label in wanted.guards]
        out: dict[str, list[dict[str, Any]]] = {"hops": [], "agents": []}
        if wanted.hops:
            largest = self._largest("chain", wanted.hops + 1)
            out["hops"] = [p for guard in chosen for p in self._by_hop(largest, guard)]
        if wanted.agents:
            largest = self._largest("hierarchy", max(wanted.agents))
            out["agents"] = [p for guard in chosen for p in self._by_agents(largest, guard)]
        return out

    def _largest(self, kind: Kind, agents: int) -> CurveSegments:
        wanted, setup = self.plan.curves, self.runner.s
        data = replace(
            self.plan.data,
            train_scenarios=wanted.train_scenarios,
            test_scenarios=wanted.test_scenarios,
        )
        spec = TopologySpec(f"{kind}-{agents}", kind, agents)
        return CurveSegments(setup.model, setup.guards, spec, data)

    def _attempts(self, hops: CurveSegments, guard: HopGuard) -> list[Attempt]:
        """One fresh attack on all single segments of the largest graph."""
        attack = next(a for a in self.plan.attacks if a.name == self.plan.curves.attack)
        case = Case(hops, guard, attack=attack, seed=self.plan.seeds[0])
        return self.runner.fit([case], apart=False)[0]

    def _utility(
        self, hops: CurveSegments, guard: HopGuard | None, edges: set[str]
    ) -> float | None:
        found = self.runner.utility(Case(hops, guard, seed=self.plan.seeds[0]))
        return asr([a for a in found if a.edge in edges])

    def _by_hop(self, hops: CurveSegments, guard: HopGuard) -> list[dict[str, Any]]:
        attempts, points = self._attempts(hops, guard), []
        names = [link.name for link in sorted(hops.topology.links, key=hops.topology.hop)]
        for k, name in enumerate(names, 1):
            so_far = names[:k]
            points.append(
                {
                    "guard": guard.label,
                    "hops": k,
                    "utility": self._utility(hops, guard, {name}),
                    "utility_vanilla": self._utility(hops, None, {name}),
                    "asr_edge": best_attack([a for a in attempts if a.edge == name]).value,
                    "asr_path": best_attack([a for a in attempts if a.edge in so_far]).value,
                }
            )
        return points

    def _by_agents(self, hops: CurveSegments, guard: HopGuard) -> list[dict[str, Any]]:
        attempts, points = self._attempts(hops, guard), []
        compositions = {s.scenario_id: s.compositions for s in hops.sides[1]}
        for n in self.plan.curves.agents:
            small = hops.cut(n)
            edges = {link.name for link in small.topology.links}
            kept = {held(a) for a in attempts if a.edge in edges}
            seen = union(attempts, edges, kept)
            composed = compose(seen, compositions, kept)
            points.append(
                {
                    "guard": guard.label,
                    "agents": n,
                    "utility": self._utility(small, guard, edges),
                    "utility_vanilla": self._utility(small, None, edges),
                    "asr_graph": best_attack(seen).value,
                    "asr_composed": best_attack(composed).value if composed else None,
                    "composed_secrets": len(composed),
                }
            )
        return points


def _part(scenario: Scenario, topology: Topology) -> Scenario:
    return replace(
        scenario,
        agents=tuple(a for a in scenario.agents if a.name in topology.agents),
        edges=tuple(e for e in scenario.edges if e.source in topology.agents),
    )
