"""Segments over a graph of agents: every link's on their own, and a scenario's together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lcguard.agents.backends.hf import HFBackend
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.orchestrator import Received, Trace, run
from lcguard.agents.scenarios.generator import GeneratorConfig
from lcguard.agents.scenarios.graph import make_graph_scenario
from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Topology, chain, hierarchy
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.multihop_plan import GraphData, TopologySpec
from lcguard.evaluation.plan import DataConfig, GuardSpec, PolicySpec
from lcguard.evaluation.segments import (
    ATTACKER,
    VICTIM,
    Answer,
    Observed,
    Segments,
    Side,
    noise_seed,
)
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData, KVBatch
from lcguard.tokens import Special
from lcguard.training.dataset import attack_data
from lcguard.training.joint import join_data


class GraphSegments(Segments):
    """Agents run over the graph on both sides' scenarios; a link's policy is its own.

    The last guard's segments are kept: attacks on one guard follow each other.
    """

    def __init__(
        self,
        model: HFBackend,
        guards: Mapping[str, FrozenGuard],
        spec: TopologySpec,
        data: GraphData,
        sides: tuple[list[Scenario], list[Scenario]] | None = None,
    ) -> None:
        """``sides``: the attackers' and the victims' scenarios, where ``data`` is not to say."""
        self.model, self.guards, self.spec, self.data = model, guards, spec, data
        self.topology = topology_of(spec)
        self.name = self.topology.name
        self.sides = sides or (
            scenarios_of(self.topology, data, "coined", data.train_scenarios),
            scenarios_of(self.topology, data, "test", data.test_scenarios, 1),
        )
        self._last: tuple[tuple[str, int], tuple[Observed, Observed]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        sizes = [len(side) for side in self.sides]
        return {"spec": asdict(self.spec), "scenarios": sizes, "data": asdict(self.data)}

    def prepare(self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int) -> None:
        self.observed(guard, policy, seed, VICTIM)

    def observed(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int, side: Side
    ) -> Observed:
        key = (guard.label if guard else "", seed)
        if self._last is None or self._last[0] != key:
            found = [
                observe(self.trace(guard, of, noise_seed(seed, of)), self.model.special)
                for of in (ATTACKER, VICTIM)
            ]
            self._last = (key, (found[0], found[1]))
        return self._last[1][side]

    def trace(self, guard: GuardSpec | None, side: Side, noise: int, *, ask: bool = False) -> Trace:
        """One side's run. Raw KV where there is no guard."""
        agents = (
            HFAgents(self.model, "kv")
            if guard is None
            else HFAgents(self.model, "guarded", {"*": self.guards[guard.label]}, noise)
        )
        return run(agents, self.topology, self.sides[side], self.model.encoder, ask)

    def answers(
        self, guard: GuardSpec | None, policy: PolicySpec | None, seed: int
    ) -> Iterator[Answer]:
        return self.answered(guard, noise_seed(seed, VICTIM))

    def answered(self, guard: GuardSpec | None, noise: int) -> Iterator[Answer]:
        """Every audience's task questions about what was handed to it."""
        for i, a in enumerate(self.trace(guard, VICTIM, noise, ask=True).answered):
            name = f"{a.question.field}/{a.question.kind}/{i}"
            yield Answer(a.record, a.question, name, "utility", a.right)

    def unguarded(self) -> AttackData:
        """Ordinary single records, whose many values teach a decoder more than a path's few."""
        wanted = DataConfig(
            seed=self.data.seed + 7, train_records=self.data.warm_records, test_records=1
        )
        records = self.model.encoder.encode(hops_for(wanted)[0])
        raw = self.model.source.prefill([r.ids for r in records])
        return attack_data(records, raw, self.model.special)


def topology_of(spec: TopologySpec) -> Topology:
    """Raises ``ValueError`` for unknown agents, cycles and the like."""
    if spec.kind == "chain":
        made = chain(spec.agents, spec.name)
    elif spec.kind == "hierarchy":
        made = hierarchy(spec.agents, spec.name)
    else:
        agents = tuple(dict.fromkeys(a for x in spec.links for a in (x.source, x.audience)))
        made = Topology(spec.name, agents, spec.links)
    return Topology(made.name, made.agents, made.links, spec.relay)


def scenarios_of(
    topology: Topology, data: GraphData, split: str, n: int, seed: int = 0
) -> list[Scenario]:
    """``n`` generated scenarios; ``split`` ``coined`` for attackers, ``test`` for victims."""
    config = GeneratorConfig(
        data.seed + seed, split, data.min_fields, data.max_fields, data.filler, 0.0
    )
    return [make_graph_scenario(config, i, topology) for i in range(n)]


def observe(trace: Trace, special: Special) -> Observed:
    """The pairs of a trace. Raises ``ValueError`` for a text handoff, which has no KV."""
    hops = list(trace.received.values())
    records = [r for hop in hops for r in hop.records]
    kv = KVBatch.stack([x.kv() for hop in hops for x in hop.references])
    single = attack_data(records, kv, special)
    single = replace(
        single,
        record_ids=[f"{r.record_id}@{r.edge}" for r in records],
        on=_consumed(hops),
    )
    distinct = _distinct(hops)
    parts = [
        attack_data(hop.records, KVBatch.stack([x.kv() for x in hop.references]), special)
        for hop in distinct
    ]
    joint = join_data(parts, [_part_name(hop, distinct) for hop in distinct], trace.scenarios)
    owners = tuple(tuple(hop.records[i] for hop in distinct) for i in range(len(trace.scenarios)))
    return Observed(single, tuple(records), joint, owners)


def _distinct(hops: Sequence[Received]) -> list[Received]:
    """One hop for each stored segment: the same segment to a second audience adds nothing."""
    found: dict[str, Received] = {}
    for hop in hops:
        found.setdefault(hop.references[0].key, hop)
    return list(found.values())


def _part_name(hop: Received, hops: Sequence[Received]) -> str:
    """The holder; with the audience where it publishes under more than one policy."""
    twice = sum(h.link.source == hop.link.source for h in hops) > 1
    return hop.link.name if twice else hop.link.source


def _consumed(hops: Sequence[Received]) -> KVBatch:
    """What the sender of each row had read before, with no valid token where that was nothing."""
    first = hops[0].references[0].kv()
    nothing = KVBatch(
        first.keys[..., :1, :], first.values[..., :1, :], torch.zeros_like(first.valid[:, :1])
    )
    rows = [
        KVBatch.join([x.kv() for x in row]) if row else nothing
        for hop in hops
        for row in hop.consumed
    ]
    return KVBatch.stack(rows)
