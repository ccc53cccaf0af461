"""From the attempts on several hops to their figures: what an edge, a path and the graph give away,
by topology and guard, and how that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lcguard.agents.latency import latency
from lcguard.evaluation.curves import Curves
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.graph_segments import GraphSegments
from lcguard.evaluation.leakage import measure
from lcguard.evaluation.multihop_plan import HopGuard, MultihopConfig
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.runner import Case, Runner
from lcguard.evaluation.statistics import BestAttack, asr, mean_over_categories
from lcguard.evaluation.summary import utility_figures


@dataclass(frozen=True)
class GraphRun:
    """Several hops under a plan."""

    runner: Runner
    plan: MultihopConfig
    graphs: Sequence[GraphSegments]
    folder: RunFolder

    def figures(self) -> dict[str, Any]:
        """Runs what is missing and returns the report's figures."""
        rows = []
        for graph in self.graphs:
            # the cheapest guards to judge first: identity says what the attackers are worth
            for guard in self.plan.guards:
                row = self._row(graph, guard)
                if self.plan.latency.runs:
                    measured = self._latency(graph, guard)
                    row["latency_vs_text"] = measured["guarded_ms"] / measured["text_ms"]
                    row["latency"] = measured
                rows.append(row)
        return {"results": rows, "curves": Curves(self.runner, self.plan).points()}

    def _attacked(self, case: Case, guard: HopGuard) -> list[Attempt]:
        first = case.seed == self.plan.seeds[0]
        attacks = [
            a for a in guard.asked(self.plan.attacks) if first or a.name not in self.plan.once
        ]
        everything = guard.name in self.plan.run_all and first and case.hops is self.graphs[0]
        return self.runner.run_guard(case, attacks, everything=everything)

    def _row(self, graph: GraphSegments, guard: HopGuard) -> dict[str, Any]:
        """One guard on one topology, over all seeds."""
        attempts, utility, floor = [], [], []
        for seed in self.plan.seeds:
            case, unguarded = Case(graph, guard, seed=seed), Case(graph, seed=seed)
            blind = replace(unguarded, attack=self.plan.floor_attack, kind="floor")
            floor += self.runner.fit([blind], apart=False)[0]
            utility += self.runner.utility(case)
            attempts += self._attacked(case, guard)
        vanilla = self.runner.utility(Case(graph, seed=self.plan.seeds[0]))
        compositions = {s.scenario_id: s.compositions for s in graph.sides[1]}
        found = measure(graph.topology, attempts, floor, compositions)
        guessed = mean_over_categories(floor)
        row = {
            "topology": graph.name,
            "guard": guard.name,
            "variant": guard.variant,
            **utility_figures(utility, vanilla),
            "utility_by_edge": {
                link.name: asr([a for a in utility if a.edge == link.name])
                for link in graph.topology.links
            },
            "asr_edge_max": found.edge_max,
            "asr_by_edge": {name: _best(b) for name, b in found.by_edge.items()},
            "asr_by_path": {name: _best(b) for name, b in found.by_path.items()},
            "asr_graph": found.graph.value,
            "asr_graph_ci": found.graph.ci,
            "asr_graph_best": found.graph.name,
            "asr_graph_by_attack": {k: e.value for k, e in found.graph.by_attack.items()},
            "floor": guessed.value,
            "floor_ci": guessed.ci,
            "gap": found.gap,
            "composed": {
                "edge_max": found.composed_edge_max,
                "graph": found.composed_graph,
                "gap": found.composed_gap,
                "floor": found.composed_floor,
                "secrets": found.n_composed,
            },
            "seeds": len(self.plan.seeds),
            "errors": sum(a.outcome is Outcome.ERROR for a in attempts),
            "latency_vs_text": None,
        }
        self.runner.s.say(
            f"==> {graph.name} {guard.label}: utility {row['utility'] or 0:.3f} of "
            f"{row['utility_vanilla'] or 0:.3f}, edge {found.edge_max or 0:.3f}, graph "
            f"{found.graph.value or 0:.3f} ({found.graph.name}), floor {guessed.value or 0:.3f}"
        )
        return row

    def _latency(self, graph: GraphSegments, guard: HopGuard) -> dict[str, Any]:
        """Measured once a run and kept: a resumed run reports the same."""
        name = f"latency {graph.name} {guard.label}"
        known, wanted = self.folder.timing(), self.plan.latency
        if name not in known:
            frozen, model = self.runner.s.guards[guard.label], self.runner.s.model
            found = latency(model, graph.topology, frozen, wanted.runs, wanted.context_tokens)
            known[name] = {k: float(v) for k, v in asdict(found).items()}
            self.folder.save_timing(known)
        return dict(known[name])


def _best(found: BestAttack) -> dict[str, Any]:
    return {"asr": found.value, "ci": found.ci, "attack": found.name}
