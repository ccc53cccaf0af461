"""From an orchestrated run to attack pairs: single segments of all links, and joint ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lcguard.agents.orchestrator import Received, Trace
from lcguard.agents.scenarios.generator import GeneratorConfig
from lcguard.agents.scenarios.graph import make_graph_scenario
from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Link, Topology, chain, hierarchy
from lcguard.evaluation.multihop_plan import GraphData, TopologySpec
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import TokenRecord
from lcguard.training.dataset import Special, attack_data
from lcguard.training.joint import join_data


def topology_of(spec: TopologySpec) -> Topology:
    """Raises ``ValueError`` for unknown agents, cycles and the like."""
    if spec.kind == "chain":
        made = chain(spec.agents, spec.name)
    elif spec.kind == "hierarchy":
        made = hierarchy(spec.agents, spec.name)
    else:
        links = tuple(Link(x.source, x.audience, x.forbid, x.derive) for x in spec.links)
        agents = tuple(dict.fromkeys(a for x in links for a in (x.source, x.audience)))
        made = Topology(spec.name, agents, links)
    return Topology(made.name, made.agents, made.links, spec.relay)


def scenarios_of(
    topology: Topology, data: GraphData, split: str, n: int, seed: int = 0
) -> list[Scenario]:
    """``n`` generated scenarios; ``split`` ``coined`` for attackers, ``test`` for victims."""
    config = GeneratorConfig(
        data.seed + seed, split, data.min_fields, data.max_fields, data.filler, 0.0
    )
    return [make_graph_scenario(config, i, topology) for i in range(n)]


@dataclass(frozen=True)
class Seen:
    """What attackers get of one run, and whose secrets each row holds."""

    single: AttackData
    """Every segment of every link, as if received alone: B = links x scenarios."""
    records: tuple[TokenRecord, ...]
    """Of the rows of ``single``."""
    joint: AttackData
    """All distinct segments of a scenario behind each other: B = scenarios."""
    owners: tuple[tuple[TokenRecord, ...], ...]
    """Of the rows of ``joint``, part by part."""


def seen(trace: Trace, special: Special) -> Seen:
    """The pairs of a trace. Raises ``ValueError`` for a text handoff, which has no KV."""
    hops = list(trace.received.values())
    records = [r for hop in hops for r in hop.records]
    kv = KVBatch.stack([x.kv() for hop in hops for x in hop.references])
    single = attack_data(records, kv, special)
    meta = {**single.meta, "on": _consumed(hops)}
    single = AttackData(
        single.kv, single.context_ids, single.secrets,
        [f"{r.record_id}@{r.edge}" for r in records], single.mask, meta,
    )  # fmt: skip
    distinct = _distinct(hops)
    parts = [
        attack_data(hop.records, KVBatch.stack([x.kv() for x in hop.references]), special)
        for hop in distinct
    ]
    joint = join_data(parts, [_part_name(hop, distinct) for hop in distinct], trace.scenarios)
    owners = tuple(tuple(hop.records[i] for hop in distinct) for i in range(len(trace.scenarios)))
    return Seen(single, tuple(records), joint, owners)


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
