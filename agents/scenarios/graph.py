"""Seeded scenarios over a topology: every agent has a private record, some secrets need two.

Records of the agents are about one case: they share a case reference, which is no secret. Where one
record says who it is and another what is sensitive about them, the two together are a secret that
neither holds (arXiv 2509.14284).
"""

from __future__ import annotations

import random
from dataclasses import replace

from lcguard.agents.scenarios.generator import GeneratorConfig, choose_fields, write_record
from lcguard.agents.scenarios.schema import RECORD_TYPES, FieldType, RecordType
from lcguard.agents.scenarios.types import AgentSpec, Composition, EdgeSpec, Record, Scenario
from lcguard.agents.scenarios.values import anything
from lcguard.agents.topology import Topology

IDENTIFIES = ("person", "government_id")
SENSITIVE = ("health", "finance", "confidential")
CASE = FieldType("case_reference", None, anything, ("case reference",))


def make_graph_scenario(config: GeneratorConfig, index: int, topology: Topology) -> Scenario:
    """The same ``(seed, split, index, topology)`` always gives the same scenario.

    Agents take the record types in a random order, so that an audience seldom reads two records of
    one type, whose fields a question could not tell apart.
    """
    rng = random.Random(f"graph/{config.seed}/{config.split}/{topology.name}/{index}")
    kinds: list[RecordType] = []
    while len(kinds) < len(topology.agents):
        kinds += rng.sample(RECORD_TYPES, len(RECORD_TYPES))
    name = f"{topology.name}-{config.split}-{config.seed}-{index}"
    reference = CASE.sample(rng, config.split)
    agents = tuple(
        AgentSpec(agent, agent, (_record(rng, config, f"{name}-{agent}", kind, reference),))
        for agent, kind in zip(topology.agents, kinds, strict=False)
    )
    edges = tuple(EdgeSpec(x.source, x.audience, x.rule) for x in topology.links)
    scenario = Scenario(name, "generator", "mixed", agents, edges)
    return replace(scenario, compositions=compositions(rng, topology, scenario, reference))


def _record(
    rng: random.Random, config: GeneratorConfig, record_id: str, kind: RecordType, reference: str
) -> Record:
    fields = choose_fields(rng, kind, config.min_fields, config.max_fields)
    entries = [(f, f.sample(rng, config.split)) for f in fields]
    entries.insert(rng.randint(0, len(entries)), (CASE, reference))
    return write_record(rng, record_id, kind, entries, filler=config.filler)


def compositions(
    rng: random.Random, topology: Topology, scenario: Scenario, join: str
) -> tuple[Composition, ...]:
    """One secret for each pair of agents that hand something on and can be joined."""
    holders = [a for a in scenario.agents if topology.outgoing(a.name)]
    out = []
    for who in holders:
        for what in holders:
            if who.name == what.name:
                continue
            names = _fields(who, IDENTIFIES)
            facts = _fields(what, SENSITIVE)
            if names and facts:
                out.append(
                    Composition((who.name, rng.choice(names)), (what.name, rng.choice(facts)), join)
                )
    return tuple(out)


def _fields(agent: AgentSpec, categories: tuple[str, ...]) -> list[str]:
    return [s.field for r in agent.records for s in r.spans if s.category in categories]
