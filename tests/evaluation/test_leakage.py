"""Edge, path and graph leakage from attempts alone, on cases small enough to count by hand."""

from __future__ import annotations

import pytest

from lcguard.agents.scenarios.types import Composition
from lcguard.agents.topology import Link, Topology, chain
from lcguard.evaluation.leakage import GRAPH, compose, graph_secrets, held, measure, union
from lcguard.evaluation.outcomes import Attempt, Kind, Outcome

FAN = Topology("fan", ("a", "b", "c"), (Link("a", "b"), Link("a", "c", ("person",))))


def attempt(
    edge: str,
    agent: str,
    field: str,
    won: bool,
    *,
    scenario: str = "s1",
    attack: str = "probe",
    category: str = "person",
    seed: int = 0,
    kind: Kind = "attack",
) -> Attempt:
    return Attempt(
        scenario=scenario,
        edge=edge,
        record=f"{scenario}-{agent}",
        guard="g",
        policy="edge",
        attack=attack,
        seed=seed,
        category=category,
        field=f"{field}/3",
        kind=kind,
        outcome=Outcome.SUCCESS if won else Outcome.RESISTED,
    )


def test_a_secret_is_gone_once_one_edge_gives_it_away() -> None:
    tried = [attempt("a->b", "a", "name", False), attempt("a->c", "a", "name", True)]
    found = measure(FAN, tried, [], {})
    assert found.by_edge["a->b"].value == 0
    assert found.by_edge["a->c"].value == 1
    assert found.graph.value == 1
    assert found.edge_max == 1
    assert found.gap == 0


def test_the_gap_is_what_the_edges_leak_together() -> None:
    tried = [
        attempt("a->b", "a", "name", True),
        attempt("a->c", "a", "name", False),
        attempt("a->b", "a", "name", False, scenario="s2"),
        attempt("a->c", "a", "name", True, scenario="s2"),
    ]
    found = measure(FAN, tried, [], {})
    assert found.edge_max == 0.5
    assert found.graph.value == 1
    assert found.gap == 0.5


def test_what_one_audience_may_have_is_no_secret_of_the_graph() -> None:
    # health is forbidden to b and allowed to c, so that only a->b tried it
    tried = [
        attempt("a->b", "a", "name", False),
        attempt("a->c", "a", "name", False),
        attempt("a->b", "a", "diagnosis", True, category="health"),
    ]
    assert graph_secrets(FAN, tried) == {("s1", "s1-a", "name/3")}
    found = measure(FAN, tried, [], {})
    assert found.by_edge["a->b"].by_attack["probe"].value == 0.5
    assert found.graph.value == 0


def test_attackers_do_not_pool_their_luck_over_attacks_or_seeds() -> None:
    tried = [
        attempt("a->b", "a", "name", True, attack="x"),
        attempt("a->c", "a", "name", False, attack="y"),
        attempt("a->c", "a", "name", False, attack="x", seed=1),
    ]
    kept = {held(tried[0])}
    both = union(tried, {"a->b", "a->c"}, kept)
    outcomes = {(a.attack, a.seed): a.outcome.value for a in both}
    assert outcomes == {("x", 0): "success", ("y", 0): "resisted", ("x", 1): "resisted"}


def test_paths_are_unions_and_a_chain_is_its_graph() -> None:
    line = chain(3)
    tried = [
        attempt("agent1->agent2", "agent1", "name", True),
        attempt("agent2->agent3", "agent2", "name", False),
        attempt(GRAPH, "agent1", "name", True, attack="composition"),
        attempt(GRAPH, "agent2", "name", True, attack="composition"),
    ]
    found = measure(line, tried, [], {})
    assert found.graph.name == "composition"
    assert found.graph.value == 1
    assert found.by_path == {"agent1 -> agent2 -> agent3": found.graph}


class TestComposed:
    LINE = chain(3)
    WANTED = {"s1": (Composition(("agent1", "name"), ("agent2", "diagnosis"), "X7"),)}  # noqa: RUF012

    def tried(self, first: bool, second: bool) -> list[Attempt]:
        return [
            attempt("agent1->agent2", "agent1", "name", first),
            attempt("agent2->agent3", "agent2", "diagnosis", second, category="health"),
        ]

    def blind(self, won: bool) -> list[Attempt]:
        return [
            attempt("agent1->agent2", "agent1", "name", won, kind="floor"),
            attempt("agent2->agent3", "agent2", "diagnosis", won, category="health", kind="floor"),
        ]

    def test_both_parts_are_needed(self) -> None:
        for first, second in ((True, False), (False, True), (False, False)):
            found = measure(self.LINE, self.tried(first, second), self.blind(False), self.WANTED)
            assert found.composed_graph == 0
        found = measure(self.LINE, self.tried(True, True), self.blind(False), self.WANTED)
        assert (found.composed_graph, found.composed_edge_max, found.composed_gap) == (1, 0, 1)
        assert found.n_composed == 1
        assert found.composed_floor == 0

    def test_one_edge_guesses_the_other_part(self) -> None:
        found = measure(self.LINE, self.tried(True, False), self.blind(True), self.WANTED)
        assert found.composed_edge_max == 1
        assert found.composed_graph == 0
        assert found.composed_floor == 1

    def test_no_attempt_no_figure(self) -> None:
        found = measure(self.LINE, self.tried(True, True), [], {})
        assert found.composed_graph is None
        assert found.composed_gap is None
        assert not compose(self.tried(True, True)[:1], self.WANTED, set())


def test_attempts_of_another_graph_are_refused() -> None:
    with pytest.raises(ValueError, match="attempts on 'a->b', which is no link of topology"):
        measure(chain(2), [attempt("a->b", "a", "name", True)], [], {})


def test_one_lucky_guess_of_a_slow_attack_judges_nothing() -> None:
    many = [attempt("agent1->agent2", "agent1", f"f{i}", i < 3) for i in range(40)]
    few = [attempt("agent1->agent2", "agent1", "f0", True, attack="slow")]
    found = measure(chain(2), [*many, *few], [], {})
    assert found.graph.name == "probe"
    assert found.graph.value == 3 / 40
    assert found.graph.by_attack["slow"].value == 1
    assert measure(chain(2), few, [], {}).graph.name == "slow"
