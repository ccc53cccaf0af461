"""Who hands what to whom: chains, hierarchies and any directed acyclic graph, from YAML.

    name: triage
    agents: [intake, lab, doctor]
    links:
      - {source: intake, audience: doctor, forbid: [person, government_id]}
      - {source: lab, audience: doctor, forbid: [person], derive: []}

Agents that wait for nobody work at the same time: ``generations`` says which. A link without
``forbid`` hides every category.
"""

from __future__ import annotations

from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

from lcguard.categories import CATEGORIES
from lcguard.config import load_config
from lcguard.handoff.names import EdgeName
from lcguard.rule import Rule


@dataclass(frozen=True)
class Link:
    """One hop: ``audience`` receives what ``source`` publishes, under a policy of its own."""

    source: str
    audience: str
    forbid: tuple[str, ...] = CATEGORIES
    derive: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(EdgeName(self.source, self.audience))

    @property
    def rule(self) -> Rule:
        return Rule.of(self.forbid, self.derive)

    def __post_init__(self) -> None:
        try:
            _ = self.rule
        except ValueError as error:
            raise ValueError(f"link {self.name}: {error}") from None


@dataclass(frozen=True)
class Topology:
    """Agents in the order of the file, and links in the order in which an audience reads them."""

    name: str
    agents: tuple[str, ...]
    links: tuple[Link, ...]
    relay: bool = False
    """Agents also pass on, unchanged, every segment that they received."""

    def __post_init__(self) -> None:
        if len(self.agents) < 2 or len(set(self.agents)) < len(self.agents):
            raise ValueError(f"topology {self.name!r}: agents = {self.agents}: two or more, unique")
        seen: set[tuple[str, str]] = set()
        for link in self.links:
            for end in (link.source, link.audience):
                if end not in self.agents:
                    raise ValueError(
                        f"topology {self.name!r}: link {link.name} names {end!r}; agents are "
                        f"{', '.join(self.agents)}"
                    )
            if (link.source, link.audience) in seen:
                raise ValueError(f"topology {self.name!r}: link {link.name} stands twice")
            seen.add((link.source, link.audience))
        alone = [a for a in self.agents if not any(a in pair for pair in seen)]
        if alone:
            raise ValueError(f"topology {self.name!r}: {alone[0]!r} has no link; remove or link it")
        self.generations()

    def incoming(self, agent: str) -> list[Link]:
        return [link for link in self.links if link.audience == agent]

    def outgoing(self, agent: str) -> list[Link]:
        return [link for link in self.links if link.source == agent]

    def generations(self) -> list[tuple[str, ...]]:
        """Agents by the number of hops before them; those of one generation run in parallel.

        Raises ``ValueError`` naming a cycle.
        """
        sorter = TopologicalSorter(
            {a: [link.source for link in self.incoming(a)] for a in self.agents}
        )
        try:
            sorter.prepare()
        except CycleError as error:
            raise ValueError(
                f"topology {self.name!r} has a cycle: {' -> '.join(error.args[1])}"
            ) from None
        out = []
        while sorter.is_active():
            ready = set(sorter.get_ready())
            sorter.done(*ready)
            out.append(tuple(a for a in self.agents if a in ready))
        return out

    def paths(self) -> list[tuple[Link, ...]]:
        """Every way from an agent that receives nothing to one that hands nothing on."""
        done: list[tuple[Link, ...]] = []

        def walk(path: tuple[Link, ...]) -> None:
            onward = self.outgoing(path[-1].audience)
            if not onward:
                done.append(path)
            for link in onward:
                walk((*path, link))

        for link in self.links:
            if not self.incoming(link.source):
                walk((link,))
        return done

    def hop(self, link: Link) -> int:
        """1 for a link whose source received nothing; else one more than the deepest before it."""
        before = [self.hop(b) for b in self.incoming(link.source)]
        return 1 + max(before, default=0)

    def upstream(self, agent: str) -> set[str]:
        """All agents from which something can have reached ``agent``."""
        direct = {link.source for link in self.incoming(agent)}
        return direct.union(*(self.upstream(a) for a in direct))


def chain(n: int, name: str = "", forbid: tuple[str, ...] = CATEGORIES) -> Topology:
    """``n`` agents, each handing on to the next: ``n - 1`` hops."""
    agents = _names(n, "chain")
    links = tuple(Link(a, b, forbid) for a, b in pairwise(agents))
    return Topology(name or f"chain-{n}", agents, links)


def hierarchy(n: int, name: str = "", forbid: tuple[str, ...] = CATEGORIES) -> Topology:
    """``n - 1`` workers that read in parallel and hand to one manager, who merges."""
    workers = tuple(f"worker{i + 1}" for i in range(_at_least_two(n, "hierarchy") - 1))
    links = tuple(Link(w, "manager", forbid) for w in workers)
    return Topology(name or f"hierarchy-{n}", (*workers, "manager"), links)


def _names(n: int, kind: str) -> tuple[str, ...]:
    return tuple(f"agent{i + 1}" for i in range(_at_least_two(n, kind)))


def _at_least_two(n: int, kind: str) -> int:
    if n < 2:
        raise ValueError(f"{kind} of {n} agents has no hop; use 2 or more")
    return n


def load_topology(path: Path) -> Topology:
    """A topology's YAML file; unknown keys, agents and cycles are refused in one line."""
    return load_config(Topology, path)
