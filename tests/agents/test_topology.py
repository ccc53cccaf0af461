"""Graphs of agents: generations, paths, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcguard.agents.topology import Link, Topology, chain, hierarchy, load_topology
from lcguard.categories import CATEGORIES
from lcguard.config import ConfigError


def diamond() -> Topology:
    links = (Link("a", "b"), Link("a", "c"), Link("b", "d"), Link("c", "d"), Link("c", "e"))
    return Topology("diamond", ("a", "b", "c", "d", "e"), links)


def test_generations_are_what_may_run_at_once() -> None:
    assert diamond().generations() == [("a",), ("b", "c"), ("d", "e")]
    assert chain(4).generations() == [("agent1",), ("agent2",), ("agent3",), ("agent4",)]
    assert hierarchy(4).generations() == [("worker1", "worker2", "worker3"), ("manager",)]


def test_paths_hops_and_upstream() -> None:
    graph = diamond()
    paths = [[link.name for link in path] for path in graph.paths()]
    assert paths == [["a->b", "b->d"], ["a->c", "c->d"], ["a->c", "c->e"]]
    assert [graph.hop(link) for link in graph.links] == [1, 1, 2, 2, 2]
    assert graph.upstream("d") == {"a", "b", "c"}
    assert len(chain(9).paths()) == 1
    assert chain(9).hop(chain(9).links[-1]) == 8
    assert len(hierarchy(12).links) == 11


@pytest.mark.parametrize(
    ("agents", "links", "message"),
    [
        (("a", "b"), (Link("a", "b"), Link("b", "a")), "has a cycle: "),
        (("a", "b"), (Link("a", "x"),), "link a->x names 'x'; agents are a, b"),
        (("a", "b"), (Link("a", "b"), Link("a", "b")), "link a->b stands twice"),
        (("a", "b", "c"), (Link("a", "b"),), "'c' has no link; remove or link it"),
        (("a", "a"), (Link("a", "a"),), "two or more, unique"),
        (("a",), (), "two or more, unique"),
    ],
)
def test_what_is_no_graph_is_refused(
    agents: tuple[str, ...], links: tuple[Link, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Topology("t", agents, links)


def test_links_know_the_categories() -> None:
    assert Link("a", "b").forbid == CATEGORIES
    with pytest.raises(ValueError, match="link a->b: forbid names 'salary'; use person, "):
        Link("a", "b", ("salary",))
    with pytest.raises(ValueError, match="derive names 'health'; use finance"):
        Link("a", "b", ("finance",), ("health",))
    for make in (chain, hierarchy):
        with pytest.raises(ValueError, match="of 1 agents has no hop; use 2 or more"):
            make(1)


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "name: triage\nagents: [intake, lab, doctor]\nlinks:\n"
        "  - {source: intake, audience: doctor, forbid: [person]}\n"
        "  - {source: lab, audience: doctor, forbid: [health], derive: [health]}\n"
    )
    made = load_topology(path)
    assert made.generations() == [("intake", "lab"), ("doctor",)]
    assert made.links[1].derive == ("health",)
    path.write_text(path.read_text().replace("audience: doctor, forbid: [person]", "to: doctor"))
    with pytest.raises(ConfigError, match=r"t\.yaml: .*unknown key|missing"):
        load_topology(path)
