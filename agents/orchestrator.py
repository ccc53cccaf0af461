"""Runs the agents of scenarios over their graph and records what everybody received.

    trace = run(HFAgents(model, "guarded", {"*": guard}), topology, scenarios, model.encoder)
    trace.received["lab->doctor"]      # what crossed that hop, for the attacks
    trace.utility()                    # does every audience still answer its task questions?

Downstream segments are made on top of the consumed ones, so what a guard left of a secret can come
up again in a later agent's own tokens. Agents of one generation run at the same time, over all
scenarios together; a manager merges what its workers made, at offsets behind each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lcguard.agents.backends.base import AgentBackend, Ask, Reference, Turn
from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.types import Hop, Scenario
from lcguard.agents.topology import Link, Topology
from lcguard.records import TokenQuestion, TokenRecord


@dataclass(frozen=True)
class Received:
    """What crossed one hop, over all scenarios: the own tokens of ``link.source``."""

    link: Link
    hop: int
    references: tuple[Reference, ...]
    records: tuple[TokenRecord, ...]
    """What the source had read, under this link's policy."""
    consumed: tuple[tuple[Reference, ...], ...]
    """What the source had received before."""


@dataclass(frozen=True)
class Answered:
    """A task question to an audience, and whether the answer was right."""

    scenario: str
    link: str
    record: TokenRecord
    question: TokenQuestion
    right: bool


@dataclass
class Trace:
    """``M_obs``: every segment that anyone received."""

    topology: Topology
    scenarios: tuple[str, ...]
    received: dict[str, Received] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)

    def utility(self, link: str | None = None) -> float | None:
        """Share of task questions answered exactly; None where there was none."""
        right = [a.right for a in self.answered if link is None or a.link == link]
        return sum(right) / len(right) if right else None


def run(
    backend: AgentBackend,
    topology: Topology,
    scenarios: Sequence[Scenario],
    encoder: Encoder,
    ask: bool = True,
) -> Trace:
    """One run of all scenarios, generation by generation.

    Raises ``ValueError`` where a scenario's agents are not the topology's or an agent that hands
    something on has no record; whatever a guard or store raises ends the run.
    """
    read = {link.name: _records(link, scenarios, encoder) for link in topology.links}
    trace = Trace(topology, tuple(s.scenario_id for s in scenarios))
    inbox: dict[str, list[tuple[Reference, ...]]] = {
        a: [() for _ in scenarios] for a in topology.agents
    }
    for generation in topology.generations():
        senders = [a for a in generation if topology.outgoing(a)]
        turns = [
            Turn(
                s.scenario_id,
                agent,
                inbox[agent][i],
                tuple(read[link.name][i] for link in topology.outgoing(agent)),
            )
            for agent in senders
            for i, s in enumerate(scenarios)
        ]
        published = iter(backend.publish(turns))
        for agent in senders:
            before = list(inbox[agent])
            made = [next(published) for _ in scenarios]
            for k, link in enumerate(topology.outgoing(agent)):
                own = [row[k] for row in made]
                trace.received[link.name] = Received(
                    link, topology.hop(link), tuple(own), tuple(read[link.name]), tuple(before)
                )
        # an audience reads in the order of the file, and only after all of its sources are done
        for agent in topology.agents:
            arrived = [trace.received.get(link.name) for link in topology.incoming(agent)]
            if arrived and all(arrived):
                inbox[agent] = [
                    _unique(
                        [
                            x
                            for hop in arrived
                            if hop is not None
                            for x in (
                                (*hop.consumed[i], hop.references[i])
                                if topology.relay
                                else (hop.references[i],)
                            )
                        ]
                    )
                    for i in range(len(scenarios))
                ]
    if ask:
        trace.answered = _ask(backend, topology, trace, inbox)
    return trace


def _unique(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """The first of each: a relayed segment that came two ways is read once."""
    return tuple({r.key: r for r in references}.values())


def _records(link: Link, scenarios: Sequence[Scenario], encoder: Encoder) -> list[TokenRecord]:
    """What ``link.source`` read in each scenario, under the link's policy."""
    hops = []
    for s in scenarios:
        agent = next((a for a in s.agents if a.name == link.source), None)
        edge = next(
            (e for e in s.edges if (e.source, e.audience) == (link.source, link.audience)), None
        )
        if agent is None or edge is None:
            raise ValueError(f"scenario {s.scenario_id!r} has no link {link.name}: other topology")
        if len(agent.records) != 1:
            raise ValueError(
                f"scenario {s.scenario_id!r}: agent {agent.name!r} has {len(agent.records)} "
                "records; an agent that hands something on has one: merge or split them"
            )
        hops.append(Hop(s.scenario_id, edge, agent.records[0], s.task_fields, s.secret_fields))
    return encoder.encode(hops)


def _ask(
    backend: AgentBackend,
    topology: Topology,
    trace: Trace,
    inbox: dict[str, list[tuple[Reference, ...]]],
) -> list[Answered]:
    """Every audience's task questions about the records handed to it.

    A field that two of the records it reads have is not asked about: nothing would tell which.
    """
    asks: list[Ask] = []
    about: list[tuple[str, str, TokenRecord]] = []
    for agent in topology.agents:
        links = topology.incoming(agent)
        for i, scenario in enumerate(trace.scenarios):
            records = [trace.received[link.name].records[i] for link in links]
            held = [{s.field for s in r.spans} for r in records]
            for k, (link, record) in enumerate(zip(links, records, strict=True)):
                others = set().union(*(h for j, h in enumerate(held) if j != k))
                questions = tuple(
                    q
                    for q in record.questions
                    if q.task and q.kind != "absent" and q.field not in others
                )
                if questions:
                    asks.append(Ask(agent, inbox[agent][i], questions))
                    about.append((scenario, link.name, replace(record, questions=questions)))
    out = []
    for (scenario, name, record), right in zip(about, backend.answers(asks), strict=True):
        out += [
            Answered(scenario, name, record, q, ok)
            for q, ok in zip(record.questions, right, strict=True)
        ]
    return out
