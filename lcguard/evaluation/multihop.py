"""``kind: multihop``: guards x topologies x attacks x seeds, every unit resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.orchestrator import Trace, run
from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Topology
from lcguard.attacks.base import attack_class
from lcguard.evaluation.hashing import digest
from lcguard.evaluation.leakage import GRAPH, measure
from lcguard.evaluation.multihop_plan import HopGuard, MultihopConfig, TopologySpec
from lcguard.evaluation.outcomes import Attempt, Journal, Outcome
from lcguard.evaluation.parallel import side_by_side
from lcguard.evaluation.plan import AttackSpec, DataConfig
from lcguard.evaluation.segments import Seen, scenarios_of, seen, topology_of
from lcguard.evaluation.setup import attack_factory, fit_plain_guards, hops_for, load_guard
from lcguard.evaluation.statistics import mean_over_categories
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import Attack, AttackData, Guess
from lcguard.records import TokenRecord
from lcguard.training.dataset import attack_data, blind

JOINT = "composition"
"""The attack that reads joint segments; all others read single ones."""


@dataclass
class Graph:
    """A topology with its scenarios."""

    spec: TopologySpec
    topology: Topology
    train: list[Scenario]
    test: list[Scenario]


class MultihopRunner:
    """One run over a journal."""

    def __init__(
        self, config: MultihopConfig, model: HFBackend, guards: dict[str, FrozenGuard],
        journal: Journal, say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.c, self.model, self.guards, self.journal, self.say = (
            config, model, guards, journal, say,
        )  # fmt: skip
        self.make = attack_factory(model, config.broken_at)
        self._seen: tuple[Any, Seen, Seen] | None = None
        self._warm: dict[Any, Attack] = {}

    def graph(self, spec: TopologySpec) -> Graph:
        topology, d = topology_of(spec), self.c.data
        return Graph(
            spec,
            topology,
            scenarios_of(topology, d, "coined", d.train_scenarios),
            scenarios_of(topology, d, "test", d.test_scenarios, 1),
        )

    # -- what runs

    def trace(
        self, g: Graph, guard: FrozenGuard | None, scenarios: Sequence[Scenario], seed: int,
        ask: bool = False,
    ) -> Trace:  # fmt: skip
        """Raw KV where there is no guard."""
        agents = (
            HFAgents(self.model, "kv")
            if guard is None
            else HFAgents(self.model, "guarded", {"*": guard}, seed)
        )
        return run(agents, g.topology, scenarios, self.model.encoder, ask)

    def pairs(self, g: Graph, guard: HopGuard | None, seed: int) -> tuple[Seen, Seen]:
        """Attackers' and victims' pairs; the victims' noise is not the attackers'."""
        key = (g.topology.name, guard.label if guard else "", seed)
        if self._seen is None or self._seen[0] != key:
            frozen = self.guards[guard.label] if guard else None
            made = [
                seen(self.trace(g, frozen, part, seed * 1_000_003 + i * 500_009),
                     self.model.special)
                for i, part in enumerate((g.train, g.test))
            ]  # fmt: skip
            self._seen = (key, made[0], made[1])
        return self._seen[1], self._seen[2]

    def unit(
        self, kind: str, g: Graph, guard: HopGuard | None, attack: AttackSpec | None, seed: int,
        make: Callable[[], list[Attempt]], **more: Any,
    ) -> list[Attempt]:  # fmt: skip
        """Attempts from the journal, or made and committed now."""
        identity = self.identity(kind, g, guard, attack, seed) | more
        known = self.journal.done(identity)
        if known is None:
            known = make()
            self.journal.write(identity, known)
        return known

    def identity(
        self, kind: str, g: Graph, guard: HopGuard | None, attack: AttackSpec | None, seed: int
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "topology": asdict(g.spec),
            "guard": guard.label if guard else "none",
            "digest": self.guards[guard.label].digest if guard else None,
            "attack": asdict(attack) if attack else None,
            "seed": seed,
            "data": asdict(self.c.data),
            "model": self.c.model,
            "broken_at": self.c.broken_at,
        }

    def utility(self, g: Graph, guard: HopGuard | None, seed: int) -> list[Attempt]:
        """Every audience's task questions about what was handed to it."""

        def make() -> list[Attempt]:
            frozen = self.guards[guard.label] if guard else None
            trace = self.trace(g, frozen, g.test, seed * 1_000_003 + 500_009, ask=True)
            return [
                Attempt(
                    a.scenario, a.link, a.record.record_id, guard.label if guard else "none",
                    "edge", "receiver", seed, a.question.category or "task",
                    f"{a.question.field}/{a.question.kind}/{i}", "utility",
                    Outcome.SUCCESS if a.right else Outcome.RESISTED,
                )
                for i, a in enumerate(trace.answered)
            ]  # fmt: skip

        return self.unit("utility", g, guard, None, seed, make)

    def floor(self, g: Graph, seed: int) -> list[Attempt]:
        """The first fitted writer of values, on segments of other records."""
        spec = next((a for a in self.c.attacks if a.attack == "decoder"), self.c.attacks[0])
        spec = replace(spec, name=f"{spec.name}-blind", warm=False,
                       options=spec.options | self.c.floor_options)  # fmt: skip

        def make() -> list[Attempt]:
            train, test = self.pairs(g, None, seed)
            data = blind(train.single, seed), blind(test.single, seed + 1)
            guesses = self.make(spec, None, False, None).fit(data[0], seed=seed).recover(data[1])
            return self.score_single(guesses, test, None, spec.name, seed, "floor")

        return self.unit("floor", g, None, spec, seed, make)

    def attack(
        self, g: Graph, guard: HopGuard, specs: Sequence[AttackSpec], seed: int
    ) -> list[list[Attempt]]:
        """Fresh attacks on a guard, those not yet in the journal side by side."""
        missing = [
            a for a in specs
            if self.journal.done(self.identity("attack", g, guard, a, seed)) is None
        ]  # fmt: skip
        found: dict[str, tuple[list[Guess], Seen, float]] = {}
        if missing:
            train, test = self.pairs(g, guard, seed)
            for a in missing:
                if a.warm:
                    self.clean(a, seed)  # here, so that the children share it

            def job(a: AttackSpec) -> tuple[list[Guess], float]:
                started = time.perf_counter()
                data = (train.joint, test.joint) if a.attack == JOINT else (
                    train.single, test.single)  # fmt: skip
                guesses = self.fit(a, guard, data[0], seed).recover(data[1])
                return guesses, time.perf_counter() - started

            device = self.model.source.device.type
            for a, (guesses, spent) in zip(
                missing, side_by_side([partial(job, a) for a in missing], device), strict=True
            ):
                found[a.name] = (guesses, test, spent)

        def make(a: AttackSpec) -> list[Attempt]:
            guesses, test, seconds = found[a.name]
            self.say(f"{g.topology.name:12} {guard.label:22} {a.name:20} seed {seed} "
                     f"{seconds:6.1f} s")  # fmt: skip
            score = self.score_joint if a.attack == JOINT else self.score_single
            return score(guesses, test, guard, a.name, seed, "attack")

        return [self.unit("attack", g, guard, a, seed, partial(make, a)) for a in specs]

    def fit(self, a: AttackSpec, guard: HopGuard | None, data: AttackData, seed: int) -> Attack:
        warm = self.clean(a, seed) if a.warm else None
        frozen = self.guards[guard.label] if guard else None
        return self.make(a, warm, self.c.broken_at is not None, frozen).fit(data, seed=seed)

    def clean(self, a: AttackSpec, seed: int) -> Attack:
        """A decoder fitted on raw KV of ordinary records of the attackers' own, whose many values
        teach it more than a path's few: what decoder and composition start from, warm."""
        options = {k: v for k, v in a.options.items() if k != "max_segments"}
        cold = replace(a, name="clean", attack="decoder", warm=False,
                       options=options | {"fit": a.clean_fit})  # fmt: skip
        key = (digest(asdict(cold)), seed)
        if key not in self._warm:
            started = time.perf_counter()
            wanted = DataConfig(seed=self.c.data.seed + 7, train_records=self.c.data.warm_records,
                                test_records=1)  # fmt: skip
            records = self.model.encoder.encode(hops_for(wanted)[0])
            raw = self.model.source.prefill([r.ids for r in records])
            data = attack_data(records, raw, self.model.special)
            self._warm[key] = self.make(cold, None, True, None).fit(data, seed=seed)
            self.say(f"clean decoder for warm starts, seed {seed} "
                     f"{time.perf_counter() - started:6.1f} s")  # fmt: skip
        return self._warm[key]

    def run_guard(self, g: Graph, guard: HopGuard, seed: int) -> list[Attempt]:
        """All attacks; the first alone where it has broken the guard."""
        specs = [a for a in self.c.attacks if not guard.attacks or a.name in guard.attacks]
        first = seed == self.c.seeds[0]
        specs = [a for a in specs if first or a.name not in self.c.once]
        done = self.attack(g, guard, specs[:1], seed)[0]
        everything = guard.name in self.c.run_all and first and g.spec == self.c.topologies[0]
        value = mean_over_categories(done, n_boot=2).value
        if self.c.broken_at is not None and value is not None and not everything:
            if value >= self.c.broken_at:
                return done
        rest = self.attack(g, guard, specs[1:], seed)
        return done + [a for group in rest for a in group]

    # -- scoring

    def score_single(
        self, guesses: Sequence[Guess], test: Seen, guard: HopGuard | None, attack: str, seed: int,
        kind: Any,
    ) -> list[Attempt]:  # fmt: skip
        """An attack may leave out whole records that it did not try; never part of one."""
        rows = {f"{r.record_id}@{r.edge}": r for r in test.records}
        grouped: dict[str, list[Guess]] = {}
        for guess in guesses:
            grouped.setdefault(guess.record_id, []).append(guess)
        return [
            self._attempt(rows[name], rows[name].edge, s, guess, guard, attack, seed, kind)
            for name, group in grouped.items()
            for guess, s in zip(group, _secret_spans(rows[name]), strict=True)
        ]

    def score_joint(
        self, guesses: Sequence[Guess], test: Seen, guard: HopGuard | None, attack: str, seed: int,
        kind: Any,
    ) -> list[Attempt]:  # fmt: skip
        left = iter(guesses)
        out: dict[str, Attempt] = {}
        for owners in test.owners:
            for record in owners:
                for span in _secret_spans(record):
                    a = self._attempt(record, GRAPH, span, next(left), guard, attack, seed, kind)
                    # the same secret under two policies: what either segment gave away
                    if a.key not in out or a.outcome is Outcome.SUCCESS:
                        out[a.key] = a
        return list(out.values())

    def _attempt(
        self, record: TokenRecord, edge: str, span: Any, guess: Guess, guard: HopGuard | None,
        attack: str, seed: int, kind: Any,
    ) -> Attempt:  # fmt: skip
        outcome = Outcome.ERROR
        if guess.ids is not None:
            truth = self.model.decode(record.ids[span.start : span.end]).strip()
            same = self.model.decode(guess.ids).strip() == truth
            outcome = Outcome.SUCCESS if same else Outcome.RESISTED
        return Attempt(
            record.scenario_id, edge, record.record_id, guard.label if guard else "none", "edge",
            attack, seed, str(span.category), f"{span.field}/{span.start}", kind, outcome,
            guess.token_accuracy, guess.nll_nats,
        )  # fmt: skip


def _secret_spans(record: TokenRecord) -> list[Any]:
    return [s for s in record.spans if s.secret and s.category is not None]


def load(config: MultihopConfig, device: str | None) -> tuple[HFBackend, dict[str, FrozenGuard]]:
    """Model and guards, with channel statistics for those without weights."""
    for a in config.attacks:
        attack_class(a.attack)
        if a.lists:
            raise ValueError(
                f"attack {a.name!r} chooses from lists of candidates, which has another floor than "
                "the attacks over several hops: leave it out here, and run it hop by hop"
            )
    model = load_backend(config.model, device)
    guards = {g.label: load_guard(g, model) for g in config.guards}
    topology = topology_of(config.topologies[0])
    some = scenarios_of(topology, config.data, "coined", 64)
    plain = run(HFAgents(model, "kv"), topology, some, model.encoder, ask=False)
    records = [r for hop in plain.received.values() for r in hop.records]
    fit_plain_guards(guards, model, records)
    return model, guards


def row_of(runner: MultihopRunner, g: Graph, guard: HopGuard) -> dict[str, Any]:
    """One guard on one topology, over all seeds."""
    c = runner.c
    attempts, utility, floor = [], [], []
    for seed in c.seeds:
        floor += runner.floor(g, seed)
        utility += runner.utility(g, guard, seed)
        attempts += runner.run_guard(g, guard, seed)
    vanilla = runner.utility(g, None, c.seeds[0])
    compositions = {s.scenario_id: s.compositions for s in g.test}
    found = measure(g.topology, attempts, floor, compositions)
    blind_floor = mean_over_categories(floor)
    useful, before = _rate(utility), _rate(vanilla)
    row = {
        "topology": g.topology.name,
        "guard": guard.name,
        "variant": guard.variant,
        "utility": useful,
        "utility_vanilla": before,
        "utility_relative": useful / before if useful is not None and before else None,
        "utility_by_edge": {link.name: _rate([a for a in utility if a.edge == link.name])
                            for link in g.topology.links},
        "asr_edge_max": found.edge_max,
        "asr_by_edge": {name: _best(b) for name, b in found.by_edge.items()},
        "asr_by_path": {name: _best(b) for name, b in found.by_path.items()},
        "asr_graph": found.graph.value,
        "asr_graph_ci": found.graph.ci,
        "asr_graph_best": found.graph.name,
        "asr_graph_by_attack": {k: e.value for k, e in found.graph.by_attack.items()},
        "floor": blind_floor.value,
        "floor_ci": blind_floor.ci,
        "gap": found.gap,
        "composed": {"edge_max": found.composed_edge_max, "graph": found.composed_graph,
                     "gap": found.composed_gap, "floor": found.composed_floor,
                     "secrets": found.n_composed},
        "seeds": len(c.seeds),
        "errors": sum(a.outcome is Outcome.ERROR for a in attempts),
        "latency_vs_text": None,
    }  # fmt: skip
    runner.say(
        f"==> {row['topology']} {guard.label}: utility {useful or 0:.3f} of {before or 0:.3f}, "
        f"edge {found.edge_max or 0:.3f}, graph {found.graph.value or 0:.3f} "
        f"({found.graph.name}), floor {blind_floor.value or 0:.3f}"
    )
    return row


def _best(found: Any) -> dict[str, Any]:
    return {"asr": found.value, "ci": found.ci, "attack": found.name}


def _rate(attempts: Sequence[Attempt]) -> float | None:
    right = [a.outcome is Outcome.SUCCESS for a in attempts if a.scorable]
    return sum(right) / len(right) if right else None
