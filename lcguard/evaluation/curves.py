"""Leakage against the number of hops and of agents: one fitted attack per guard, many sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Topology
from lcguard.evaluation.leakage import compose, held, union
from lcguard.evaluation.multihop import Graph, MultihopRunner
from lcguard.evaluation.multihop_plan import HopGuard, TopologySpec
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.segments import scenarios_of, topology_of
from lcguard.evaluation.statistics import best_attack


def curves(runner: MultihopRunner) -> dict[str, Any]:
    """``hops`` and ``agents``: a list of points for each guard; empty where not wanted."""
    plan = runner.c.curves
    chosen = [g for g in runner.c.guards if g.label in plan.guards]
    out: dict[str, Any] = {"hops": [], "agents": []}
    if plan.hops:
        g = _graph(runner, TopologySpec(f"chain-{plan.hops + 1}", "chain", plan.hops + 1))
        out["hops"] = [p for guard in chosen for p in _by_hop(runner, g, guard)]
    if plan.agents:
        most = max(plan.agents)
        g = _graph(runner, TopologySpec(f"hierarchy-{most}", "hierarchy", most))
        out["agents"] = [p for guard in chosen for p in _by_agents(runner, g, guard, plan.agents)]
    return out


def _graph(runner: MultihopRunner, spec: TopologySpec) -> Graph:
    topology, plan, data = topology_of(spec), runner.c.curves, runner.c.data
    return Graph(
        spec,
        topology,
        scenarios_of(topology, data, "coined", plan.train_scenarios),
        scenarios_of(topology, data, "test", plan.test_scenarios, 1),
    )


def _attempts(runner: MultihopRunner, g: Graph, guard: HopGuard) -> list[Attempt]:
    """One fresh attack on all single segments of the largest graph."""
    c = runner.c
    spec = next(a for a in c.attacks if a.name == c.curves.attack)

    def make() -> list[Attempt]:
        train, test = runner.pairs(g, guard, c.seeds[0])
        guesses = runner.fit(spec, guard, train.single, c.seeds[0]).recover(test.single)
        return runner.score_single(guesses, test, guard, spec.name, c.seeds[0], "attack")

    return runner.unit("curve", g, guard, spec, c.seeds[0], make, curves=asdict(c.curves))


def _utility(runner: MultihopRunner, g: Graph, guard: HopGuard | None, size: int) -> list[Attempt]:
    """Of the graph as it is, and of hierarchies cut from it."""
    seed = runner.c.seeds[0]

    def make() -> list[Attempt]:
        frozen = runner.guards[guard.label] if guard else None
        trace = runner.trace(g, frozen, g.test, seed, ask=True)
        return [
            Attempt(a.scenario, a.link, a.record.record_id, guard.label if guard else "none",
                    "edge", "receiver", seed, "task", f"{a.question.field}/{i}", "utility",
                    Outcome.SUCCESS if a.right else Outcome.RESISTED)
            for i, a in enumerate(trace.answered)
        ]  # fmt: skip

    return runner.unit("curve-utility", g, guard, None, seed, make, size=size,
                       curves=asdict(runner.c.curves))  # fmt: skip


def _by_hop(runner: MultihopRunner, g: Graph, guard: HopGuard) -> list[dict[str, Any]]:
    attempts = _attempts(runner, g, guard)
    useful = _utility(runner, g, guard, 0)
    vanilla = _utility(runner, g, None, 0)
    points = []
    links = sorted(g.topology.links, key=g.topology.hop)
    for k, link in enumerate(links, 1):
        so_far = {x.name for x in links[:k]}
        points.append(
            {
                "guard": guard.label,
                "hops": k,
                "utility": _rate(useful, {link.name}),
                "utility_vanilla": _rate(vanilla, {link.name}),
                "asr_edge": best_attack([a for a in attempts if a.edge == link.name]).value,
                "asr_path": best_attack([a for a in attempts if a.edge in so_far]).value,
            }
        )
    return points


def _by_agents(
    runner: MultihopRunner, g: Graph, guard: HopGuard, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    attempts = _attempts(runner, g, guard)
    points = []
    for n in sizes:
        small = _cut(g, n)
        edges = {link.name for link in small.topology.links}
        kept = {held(a) for a in attempts if a.edge in edges}
        seen = union(attempts, edges, kept)
        composed = compose(seen, {s.scenario_id: s.compositions for s in g.test}, kept)
        points.append(
            {
                "guard": guard.label,
                "agents": n,
                "utility": _rate(_utility(runner, small, guard, n), edges),
                "utility_vanilla": _rate(_utility(runner, small, None, n), edges),
                "asr_graph": best_attack(seen).value,
                "asr_composed": best_attack(composed).value if composed else None,
                "composed_secrets": len(composed),
            }
        )
    return points


def _cut(g: Graph, n: int) -> Graph:
    """The hierarchy of the first ``n - 1`` workers, over the same records."""
    spec = TopologySpec(f"hierarchy-{n}", "hierarchy", n)
    topology = topology_of(spec)
    return Graph(spec, topology, [], [_part(s, topology) for s in g.test])


def _part(scenario: Scenario, topology: Topology) -> Scenario:
    return replace(
        scenario,
        agents=tuple(a for a in scenario.agents if a.name in topology.agents),
        edges=tuple(e for e in scenario.edges if e.source in topology.agents),
    )


def _rate(attempts: Sequence[Attempt], edges: set[str]) -> float | None:
    right = [a.outcome is Outcome.SUCCESS for a in attempts if a.edge in edges]
    return sum(right) / len(right) if right else None
