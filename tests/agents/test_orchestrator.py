"""Agents over a graph: what each received, made on top of what, and what stays answerable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lcguard.agents.backends.base import Turn
from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.orchestrator import Trace, run
from lcguard.agents.scenarios.generator import GeneratorConfig
from lcguard.agents.scenarios.graph import make_graph_scenario
from lcguard.agents.scenarios.types import Scenario
from lcguard.agents.topology import Link, Topology, chain, hierarchy
from lcguard.categories import CATEGORIES
from lcguard.evaluation.graph_segments import observe
from lcguard.evaluation.load import load_guard
from lcguard.evaluation.plan import GuardSpec
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import KVBatch

DIAMOND = Topology(
    "diamond",
    ("a", "b", "c", "d"),
    (Link("a", "b"), Link("a", "c", ("person", "health")), Link("b", "d"), Link("c", "d")),
)


@pytest.fixture(scope="module")
def model() -> HFBackend:
    return load_backend("nano")


@pytest.fixture(scope="module")
def gate(model: HFBackend) -> FrozenGuard:
    return load_guard(GuardSpec("gate", path="nano:gate"), model)


def scenarios(topology: Topology, n: int = 6) -> list[Scenario]:
    config = GeneratorConfig(9, "test", 3, 4, 1, 0.0)
    return [make_graph_scenario(config, i, topology) for i in range(n)]


def close(a: KVBatch, b: KVBatch) -> bool:
    a, b = a.trim(), b.trim()
    return (
        bool(torch.equal(a.valid, b.valid))
        and torch.allclose(a.values, b.values, atol=1e-4)
        and torch.allclose(a.keys, b.keys, atol=1e-4)
    )


class TestScenarios:
    def test_same_seed_same_scenario(self) -> None:
        assert scenarios(DIAMOND) == scenarios(DIAMOND)
        assert scenarios(DIAMOND)[0] != scenarios(chain(4))[0]

    def test_all_records_share_the_case_and_nothing_secret(self) -> None:
        for s in scenarios(chain(4)):
            values = [
                {x.value for x in a.records[0].spans if x.field == "case_reference"}
                for a in s.agents
            ]
            assert all(v == values[0] and len(v) == 1 for v in values)
            assert all(c.join in v for c in s.compositions for v in values)

    def test_a_composed_secret_has_two_holders(self) -> None:
        made = [c for s in scenarios(chain(4), 20) for c in s.compositions]
        assert made
        assert all(c.identifier[0] != c.attribute[0] for c in made)
        assert all("agent4" not in (c.identifier[0], c.attribute[0]) for c in made)
        by_name = {s.scenario_id: s for s in scenarios(chain(4), 20)}
        for s in by_name.values():
            held = {(a.name, x.field): x.category for a in s.agents for x in a.records[0].spans}
            for c in s.compositions:
                assert held[c.identifier] in ("person", "government_id")
                assert held[c.attribute] in ("health", "finance", "confidential")


class TestRun:
    def test_a_chain_equals_reading_the_texts_one_after_the_other(self, model: HFBackend) -> None:
        trace = run(HFAgents(model, "kv"), chain(3), scenarios(chain(3)), model.encoder)
        first, second = (trace.received[f"agent{i}->agent{i + 1}"] for i in (1, 2))
        for i in range(3):
            both = [*first.records[i].ids, *second.records[i].ids]
            whole = model.source.prefill([both])
            n = len(first.records[i].ids)
            tail = KVBatch(whole.keys[..., n:, :], whole.values[..., n:, :], whole.valid[:, n:])
            assert close(second.references[i].kv(), tail)
            assert second.consumed[i] == (first.references[i],)

    def test_a_guarded_chain_is_made_on_top_of_guarded_segments(
        self, model: HFBackend, gate: FrozenGuard
    ) -> None:
        # what the second agent publishes without a guard of its own, behind a guarded segment
        link = "agent1->agent2"
        agents = HFAgents(model, "guarded", {link: gate, "*": _identity(model)})
        trace = run(agents, chain(3), scenarios(chain(3)), model.encoder)
        first, second = trace.received[link], trace.received["agent2->agent3"]
        on = KVBatch.stack([r.kv() for r in first.references])
        raw = model.source.prefill([r.ids for r in second.records], on=on)
        assert close(KVBatch.stack([r.kv() for r in second.references]), raw)
        plain = model.source.prefill([r.ids for r in first.records])
        assert not close(on, plain)

    def test_a_manager_merges_its_workers(self, model: HFBackend) -> None:
        topology = hierarchy(4)
        trace = run(HFAgents(model, "kv"), topology, scenarios(topology, 3), model.encoder)
        parts = [trace.received[link.name] for link in topology.links]
        assert all(not any(p.consumed) for p in parts)
        merged = HFAgents(model, "kv").consumed([[p.references[0] for p in parts]])
        assert merged.valid.sum() == sum(len(p.records[0].ids) for p in parts)
        asked = {a.link for a in trace.answered}
        assert asked == {link.name for link in topology.links}

    def test_every_link_has_a_policy_of_its_own(self, model: HFBackend, gate: FrozenGuard) -> None:
        trace = run(
            HFAgents(model, "guarded", {"*": gate}), DIAMOND, scenarios(DIAMOND), model.encoder
        )
        wide, narrow = trace.received["a->b"], trace.received["a->c"]
        assert wide.records[0].forbid == CATEGORIES
        assert narrow.records[0].forbid == ("person", "health")
        assert not close(wide.references[0].kv(), narrow.references[0].kv())
        assert {trace.received[x].hop for x in ("a->b", "a->c")} == {1}
        assert trace.received["b->d"].hop == 2

    def test_one_policy_one_segment(self, model: HFBackend, gate: FrozenGuard) -> None:
        fan = Topology("fan", ("a", "b", "c"), (Link("a", "b"), Link("a", "c")))
        agents = HFAgents(model, "guarded", {"*": gate}, seed=3)
        trace = run(agents, fan, scenarios(fan), model.encoder)
        for one, two in zip(*(trace.received[x].references for x in ("a->b", "a->c")), strict=True):
            assert one.key == two.key
            assert torch.equal(one.kv().values, two.kv().values)
        # two receivers who compare notes hold one draw of the noise, not two
        joint = observe(trace, model.special).joint
        assert joint.parts == 1

    def test_noise_follows_the_seed(self, model: HFBackend, gate: FrozenGuard) -> None:
        def made(seed: int) -> KVBatch:
            agents = HFAgents(model, "guarded", {"*": gate}, seed)
            trace = run(agents, chain(2), scenarios(chain(2)), model.encoder, ask=False)
            return trace.received["agent1->agent2"].references[0].kv()

        assert close(made(1), made(1))
        assert not close(made(1), made(2))

    def test_a_relay_passes_on_what_it_received(self, model: HFBackend) -> None:
        topology = replace(chain(4), relay=True)
        trace = run(HFAgents(model, "kv"), topology, scenarios(topology, 2), model.encoder)
        keys = [[r.key for r in row] for row in trace.received["agent3->agent4"].consumed]
        first = [trace.received[f"agent{i}->agent{i + 1}"].references for i in (1, 2)]
        assert keys == [[a.key, b.key] for a, b in zip(*first, strict=True)]

    def test_text_and_raw_kv_answer_alike(self, model: HFBackend) -> None:
        topology, some = chain(3), scenarios(chain(3), 12)
        found = [run(HFAgents(model, c), topology, some, model.encoder) for c in ("text", "kv")]
        assert [a.right for a in found[0].answered] == [a.right for a in found[1].answered]
        useful = found[0].utility()
        assert useful is not None
        assert useful > 0.9
        with pytest.raises(ValueError, match="a text handoff has no KV; use channel kv or guarded"):
            found[0].received["agent1->agent2"].references[0].kv()

    def test_a_constant_guard_leaves_nothing_to_answer_from(
        self, model: HFBackend, gate: FrozenGuard
    ) -> None:
        topology, some = chain(3), scenarios(chain(3), 12)

        def useful(trace: Trace) -> float:
            return trace.utility() or 0.0

        noise = _noise(model)
        guarded = run(HFAgents(model, "guarded", {"*": gate}), topology, some, model.encoder)
        drowned = run(HFAgents(model, "guarded", {"*": noise}), topology, some, model.encoder)
        assert useful(guarded) > 0.75
        assert useful(drowned) < 0.2

    def test_a_cloak_is_undone_by_its_audience_alone(self, model: HFBackend) -> None:
        cloak = load_guard(GuardSpec("cloak", guard="cloak", options={"key": "5a" * 32}), model)
        topology, some = chain(3), scenarios(chain(3), 8)
        plain = run(HFAgents(model, "kv"), topology, some, model.encoder)
        cloaked = run(HFAgents(model, "guarded", {"*": cloak}), topology, some, model.encoder)
        assert [a.right for a in cloaked.answered] == [a.right for a in plain.answered]
        for one, two in zip(plain.received.values(), cloaked.received.values(), strict=True):
            assert not close(one.references[0].kv(), two.references[0].kv())


class TestRefusals:
    def test_no_guard(self, model: HFBackend, gate: FrozenGuard) -> None:
        with pytest.raises(ValueError, match="channel 'guarded' has no guard"):
            HFAgents(model, "guarded")
        agents = HFAgents(model, "guarded", {"x->y": gate})
        with pytest.raises(ValueError, match="link agent1->agent2 has no guard; give one"):
            run(agents, chain(2), scenarios(chain(2)), model.encoder)

    def test_a_guard_that_fails_ends_the_run(self, model: HFBackend) -> None:
        class Failing:
            name, needs_twin = "failing", False

            def __call__(self, *args: object, **kwargs: object) -> object:
                raise RuntimeError("guard is out of order")

        agents = HFAgents(model, "guarded", {"*": Failing()})  # type: ignore[dict-item]
        with pytest.raises(RuntimeError, match="out of order"):
            run(agents, chain(3), scenarios(chain(3)), model.encoder)

    def test_scenarios_of_another_topology(self, model: HFBackend) -> None:
        with pytest.raises(ValueError, match="has no link agent1->agent2: other topology"):
            run(HFAgents(model, "kv"), chain(2), scenarios(DIAMOND), model.encoder)
        some = scenarios(chain(2), 1)[0]
        empty = replace(some, agents=(replace(some.agents[0], records=()), some.agents[1]))
        with pytest.raises(ValueError, match="agent 'agent1' has 0 records"):
            run(HFAgents(model, "kv"), chain(2), [empty], model.encoder)


def test_turns_of_one_call_do_not_touch_each_other(model: HFBackend) -> None:
    trace = run(HFAgents(model, "kv"), chain(2), scenarios(chain(2), 4), model.encoder)
    turns = [Turn(r.scenario_id, "agent1", (), (r,)) for r in _records(trace)]
    together = HFAgents(model, "kv").publish(turns)
    for turn, (reference,) in zip(turns, together, strict=True):
        ((alone,),) = HFAgents(model, "kv").publish([turn])
        assert close(alone.kv(), reference.kv())


def _records(trace: Trace) -> Sequence[object]:
    return trace.received["agent1->agent2"].records


def _identity(model: HFBackend) -> FrozenGuard:
    return load_guard(GuardSpec("identity", guard="identity"), model)


def _noise(model: HFBackend) -> FrozenGuard:
    guard = load_guard(GuardSpec("gaussian", guard="gaussian", options={"noise": 20.0}), model)
    guard.module.fit_statistics(model.source.prefill([tuple(range(20, 90))]))
    return guard
