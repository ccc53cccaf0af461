"""The loop's decisions: who is judged how, when it goes back, and what a step refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.scenarios.jsonl_writer import jsonl_of
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands.loop_collect import closed_under, collect, hidden_on, read_leak
from lcguard.commands.loop_config import LoopConfig, load_loop
from lcguard.commands.loop_judge import judge, plan_of, promote, read_judged
from lcguard.commands.loop_round import begin
from lcguard.commands.loop_train import train, training_of
from lcguard.commands.loop_verdict import decide, worst_by_category
from lcguard.commands.loop_watch import watch_once
from lcguard.config import ConfigError
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.results import GuardRow
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import WEIGHTS, Card, FrozenGuard
from lcguard.guards.registry import Judgement, Registry, record_mark
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.training.certificate import Certificate
from tests.matrix import GUARDS

KEY = b"k" * 32
EDGE = ("acme", "intake", "billing")
GOOD = Judgement(accepted=True, reason="good")


def attempt(category: str, won: bool, i: int, attack: str = "probe") -> Attempt:
    return Attempt(
        scenario=f"s{i}",
        edge="a->b",
        record=f"r{i}",
        guard="candidate",
        policy="",
        attack=attack,
        seed=0,
        category=category,
        field=category,
        kind="attack",
        outcome=Outcome.SUCCESS if won else Outcome.RESISTED,
    )


def attempts(**won: int) -> list[Attempt]:
    """Twenty of each category, so many of them won."""
    return [attempt(c, i < n, i) for c, n in won.items() for i in range(20)]


def row(**changes: Any) -> GuardRow:
    found: dict[str, Any] = {
        "guard": "candidate",
        "asr_fresh": 0.01,
        "asr_fresh_ci": [0.0, 0.03],
        "floor": 0.0,
        "utility": 0.95,
        "utility_vanilla": 0.97,
    }
    return GuardRow.of(found | changes)


def certificate(nats: float, vacuous: bool) -> Certificate:
    return Certificate(
        nats, nats, 0.95, nats, nats, nats, 1e4, 60, 0.05, 0.99 if vacuous else 0.3, vacuous
    )


FINE = attempts(person=0, contact=1, health=0)
PROVEN = certificate(5, False), certificate(5, False)


def verdict(found: GuardRow, tried: list[Attempt], ceiling: float | None = 0.9, **more: Any) -> Any:
    given: dict[str, Any] = {"certificates": PROVEN, "limit": 0.2} | more
    return decide(found, tried, ceiling, **given)


def test_nothing_against_it_is_accepted() -> None:
    found = verdict(row(), FINE)
    assert found.accepted
    assert found.figures["categories"]["contact"]["asr"] == pytest.approx(0.05)


def test_one_category_does_not_hide_behind_the_others() -> None:
    """Its mean over seven is below the limit, and another attack is the best on the whole."""
    tried = attempts(**{c: 0 for c in CATEGORIES}) + [
        attempt("contact", i < 15, i, "linear") for i in range(20)
    ]
    found = verdict(row(asr_fresh=0.107, asr_fresh_ci=[0.08, 0.13]), tried)
    assert not found.accepted
    assert found.reason.startswith("contact leaks: 75.0%, at least ")
    assert worst_by_category(tried)["contact"]["n"] == 20


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"asr_fresh": 0.15, "asr_fresh_ci": [0.1, 0.25]}, "which may be above 20%"),
        ({"asr_fresh": None}, "was not measured"),
        ({"counts": {"error": 2}}, "2 attempts ended in an error"),
        ({"utility": 0.8}, r"keeps 82\.5% of its right answers, not 97%"),
        ({"utility": None}, "still answers was not measured"),
        ({"likelihood": {"100": {"asr": 0.6, "floor": 0.01}}}, "from a list of candidates 60"),
    ],
)
def test_what_speaks_against_it(changes: dict[str, Any], why: str) -> None:
    found = verdict(row(**changes), FINE)
    assert not found.accepted
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.reason)


def test_attackers_who_fail_on_raw_kv_judge_nothing() -> None:
    for ceiling in (None, 0.3):
        assert "so that they judge nothing" in verdict(row(), FINE, ceiling).reason


def test_a_vacuous_certificate_may_not_be_worse_than_the_live_ones() -> None:
    worse = certificate(50, True), certificate(5, False)
    assert (
        "up to 50 nats, the live guard's at most 5"
        in verdict(row(), FINE, certificates=worse).reason
    )
    better = certificate(50, True), certificate(4000, True)
    assert verdict(row(), FINE, certificates=better).accepted
    assert verdict(row(), FINE, certificates=(None, None)).accepted


# -- what canaries found


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """v1 and, live, v2: random gates."""
    found = Registry(tmp_path / "guards", KEY)
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = guard_class("gate").build(KVShape(2, 1, 8), len(CATEGORIES), dict(GUARDS["gate"]))
        folder = tmp_path / f"g{seed}"
        card = Card(guard="gate", options=module.options(), shape=(2, 1, 8))
        FrozenGuard(module, card).save_pretrained(folder)
        found.promote(found.add(folder, GOOD).name, "good")
    return found


def screened(meter: LeakageMeter, digest: str, recovered: int) -> None:
    low, high = (0.5, 0.8) if recovered > 20 else (0.0, 0.1)
    found = {"n_secrets": 60, "recovered": recovered, "asr": recovered / 60, "floor": 0.0}
    edge = dict(zip(("tenant", "source", "audience"), EDGE, strict=True))
    meter.record(
        {
            **found,
            **edge,
            "asr_low": low,
            "asr_high": high,
            "attack": "probe",
            "guard": "gate",
            "guard_digest": digest,
            "policy_digest": "p" * 64,
        }
    )


def test_watching_goes_back_once_and_never_to_what_leaked(
    registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "lcguard.sqlite"
    meter = LeakageMeter(Database(path), 0.2, 3600)
    v1, v2 = registry.state.versions
    screened(meter, v2.digest, 0)
    assert watch_once(registry, path, 0.2).action == "none"
    screened(meter, v2.digest, 40)
    assert [e.name for e in closed_under(path, v2.digest)] == [EDGE]
    found = watch_once(registry, path, 0.2)
    assert (found.action, found.version) == ("rollback", "v1")
    assert "acme/intake/billing: 40 of 60 planted secrets read, at least 50%" in found.why
    # the database still says what it said of v2
    assert watch_once(registry, path, 0.2).action == "none"
    screened(meter, v1.digest, 40)
    stuck = watch_once(registry, path, 0.2)
    assert (stuck.action, stuck.version) == ("stuck", "v1")
    assert meter.verdict(*EDGE) == "closed"
    assert all(v.withdrawn for v in registry.state.versions)


def test_a_closed_edge_opens_behind_another_version(registry: Registry, tmp_path: Path) -> None:
    meter = LeakageMeter(Database(tmp_path / "lcguard.sqlite"), 0.2, 3600)
    v1, v2 = registry.state.versions
    screened(meter, v2.digest, 40)
    assert meter.verdict(*EDGE) == "closed"
    screened(meter, v1.digest, 0)
    assert meter.verdict(*EDGE) == "open"


def test_without_a_leak_and_without_records_there_is_nothing_to_do(
    registry: Registry, tmp_path: Path
) -> None:
    path, out = tmp_path / "lcguard.sqlite", tmp_path / "round"
    LeakageMeter(Database(path), 0.2, 3600).record_error(EDGE, "no engine")
    leak = collect(LoopConfig(), registry, out, database=path)
    assert not leak.needed
    assert train(LoopConfig(), registry, out) is None
    with pytest.raises(ValueError, match="does not exist: give the"):
        collect(LoopConfig(), registry, tmp_path / "other", database=tmp_path / "none.sqlite")


def test_new_records_are_enough_and_stay_as_collected(registry: Registry, tmp_path: Path) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "round"
    data.write_text(jsonl_of(load_hops("generator", seed=3, split="coined", n=4)))
    leak = collect(LoopConfig(), registry, out, data=data)
    assert leak.needed
    assert leak.own_records == leak.hard_records > 0
    assert collect(LoopConfig(), registry, out, data=None) == leak  # done is done
    (out / "hard.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="changed since it was collected"):
        read_leak(out)


def test_the_trainings_attacker_is_a_little_stronger_than_the_measured_one(
    registry: Registry, tmp_path: Path
) -> None:
    out = tmp_path / "round"
    leak = collect(LoopConfig(), registry, out).model_copy(
        update={"attack_steps": 300, "hard_records": 5, "edges": ("a/b/c",)}
    )
    run = training_of(LoopConfig(), leak, registry, registry.state.live_version, out)
    adversary = run.train.adversary
    assert adversary.attack == leak.attack == "probe"
    assert 300 <= adversary.steps_per_guard_step * run.train.steps <= 2 * 300
    assert run.train.guard == "gate"
    assert run.train.options["width"] == GUARDS["gate"]["width"]
    assert run.hard == str(out / "hard.jsonl")


def test_a_round_ends_where_another_was_promoted_meanwhile(
    registry: Registry, tmp_path: Path
) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "round"
    data.write_text(jsonl_of(load_hops("generator", seed=3, split="coined", n=4)))
    collect(LoopConfig(), registry, out, data=data)
    registry.rollback("by hand")
    with pytest.raises(ValueError, match="was collected under v2, live is v1"):
        train(LoopConfig(), registry, out)


def test_a_damaged_candidate_is_refused_unread(registry: Registry, tmp_path: Path) -> None:
    folder, out = tmp_path / "candidate", tmp_path / "round"
    registry.load(registry.state.live_version).save_pretrained(folder)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    found = judge(LoopConfig(), registry, out, guard=folder)
    assert not found.judgement.accepted
    assert "altered or cut" in found.judgement.reason
    assert promote(registry, out) == ""
    assert read_judged(out) == found
    assert len(registry.state.versions) == 2


def test_a_guard_for_another_model_is_refused(registry: Registry, tmp_path: Path) -> None:
    found = judge(LoopConfig(), registry, tmp_path / "round", guard=tmp_path / "g1")
    assert not found.judgement.accepted
    assert "was made for model weights" in found.judgement.reason


def test_what_was_trained_on_is_not_judged_on(registry: Registry, tmp_path: Path) -> None:
    """Here of the live guard's training: the candidate came from elsewhere."""
    config = LoopConfig()
    config = replace(
        config,
        judge=replace(
            config.judge, data=replace(config.judge.data, train_records=8, test_records=8)
        ),
    )
    guard = FrozenGuard.from_pretrained(tmp_path / "g1")
    folder = tmp_path / "other"
    guard.with_card(model_id="another").save_pretrained(folder)
    plan = plan_of(config, registry, folder, guard.digest)
    seen = hops_for(plan.data)[1][3].record.text
    fresh = Registry(tmp_path / "more", KEY)
    begin(fresh, str(tmp_path / "g2"), "a test's", frozenset({record_mark(seen)}))
    with pytest.raises(ValueError, match="1 of the records to judge on were trained on"):
        judge(config, fresh, tmp_path / "round", guard=folder)


def test_a_registry_begins_with_what_speaks_for_itself(tmp_path: Path, registry: Registry) -> None:
    fresh = Registry(tmp_path / "more", KEY)
    with pytest.raises(ValueError, match="neither a certificate nor an evaluation"):
        begin(fresh, str(tmp_path / "g1"))
    assert begin(fresh, "nano:gate").name == "v1"
    with pytest.raises(ValueError, match="has v1 live"):
        begin(fresh, "nano:gate")


def test_edges_hide_what_the_policy_says(registry: Registry, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        json.dumps(
            {
                "version": 1,
                "edges": [
                    {
                        "tenant": "acme",
                        "source": "intake",
                        "audience": "billing",
                        "forbid": ["health", "person"],
                    }
                ],
            }
        )
    )
    path = tmp_path / "lcguard.sqlite"
    meter = LeakageMeter(Database(path), 0.2, 3600)
    screened(meter, registry.state.live_version.digest, 40)
    edges = closed_under(path, registry.state.live_version.digest)
    assert hidden_on(edges, policy) == ("person", "health")
    assert hidden_on(edges, None) == CATEGORIES


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("limit: 1.5", "limit=1.5"),
        ("budget: 0.5", "budget=0.5: an attacker weaker"),
        ("judge: {guards: [{name: x, guard: identity}]}", "judge.guards"),
        ("steps: 3", "unknown key"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        load_loop(path)


def test_a_part_that_is_named_keeps_the_rest_of_the_loops_own(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("train: {train: {steps: 40}}\njudge: {data: {test_records: 30}}\n")
    found, own = load_loop(path, ["train.train.batch=8"]), LoopConfig()
    assert (found.train.train.steps, found.train.train.batch) == (40, 8)
    assert found.train.train.adversary == own.train.train.adversary
    assert (found.judge.data.test_records, found.judge.attacks) == (30, own.judge.attacks)
    assert load_loop(None) == own
