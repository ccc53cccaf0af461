"""A detector's training in rounds: what attackers recover of records that no fit has seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands import detector_rounds
from lcguard.commands.detector import DetectorRun, quickened, train_detector
from lcguard.commands.detector_rounds import RoundsConfig, Stage, play
from lcguard.config import load_config
from lcguard.evaluation.attacked_twins import RECOVERED, Attackers, twins
from lcguard.evaluation.plan import AttackSpec, DataConfig
from lcguard.guards import FrozenGuard, KVShape
from lcguard.guards.twin import TwinGuard
from lcguard.tokens import TokenRecord
from lcguard.training.dataset import guard_all
from lcguard.training.fit_detector import DetectorConfig, ReadRecords, fit_detector, read_records
from lcguard.training.hard_examples import (
    Emphasis,
    divided,
    recovery_budgets,
    uncertain_labels,
)
from lcguard.training.kept_tensors import KeptTensors
from lcguard.training.rare_categories import category_weights

OPTIONS = {"width": 32, "blocks": 1, "peak": 0.0}
FIT = DetectorConfig(steps=25, batch=4, lr=4e-3, warmup=5, touch_cost=0.3)
ROUNDS = RoundsConfig(count=2, steps=10, records=8)


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return load_backend("nano")


@pytest.fixture(scope="module")
def read(agent: HFBackend) -> tuple[TwinGuard, ReadRecords, ReadRecords]:
    """A fresh detector, and what it reads of training and of validation records."""
    hops = load_hops("generator", seed=9, split="coined", n=40)[:40]
    records = agent.encoder.encode(hops)
    torch.manual_seed(0)
    module = TwinGuard.build(KVShape(*agent.source.shape), len(CATEGORIES), OPTIONS)
    both = read_records(module, records, agent.source)
    names = sorted({r.scenario_id for r in records})
    held = set(names[: len(names) // 4])
    at = [[i for i, r in enumerate(records) if (r.scenario_id in held) is h] for h in (False, True)]
    return module, both.part(at[0]), both.part(at[1])


def staged(
    agent: HFBackend,
    read: tuple[TwinGuard, ReadRecords, ReadRecords],
    folder: Path | None = None,
    fit: DetectorConfig = FIT,
    validation: ReadRecords | None = None,
) -> Stage:
    """A copy of the fresh detector, ready to be fitted."""
    chosen_on = validation or read[2]
    from lcguard.commands import detector

    module = TwinGuard.build(read[0].shape, len(CATEGORIES), OPTIONS)
    module.load_state_dict(read[0].state_dict())
    run = DetectorRun(model="nano", options=OPTIONS, detector=fit)
    return Stage(
        agent,
        module,
        fit,
        KeptTensors(folder),
        lambda: detector._chosen(run, module, [chosen_on]),
        lambda guard: detector._cost(run, [chosen_on], guard),
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_without_rounds_it_is_one_fit_on_all_records(agent: HFBackend, read: Any) -> None:
    stage, plain = staged(agent, read), staged(agent, read)
    guard, done = play(RoundsConfig(), stage, [read[1]])
    fit_detector(plain.module, [read[1]], FIT)
    assert done == []
    assert same(weights(guard), weights(plain.module))


def test_twins_are_those_that_the_guard_makes(agent: HFBackend, read: Any) -> None:
    stage = staged(agent, read)
    guard, _ = play(RoundsConfig(), stage, [read[1]])
    part = read[2].part(range(4))
    raw = agent.source.prefill([r.ids for r in part.records])
    sent = guard_all(FrozenGuard(guard), part.records, raw, agent.source, agent.special)
    made = twins(guard, agent, part, 0)
    torch.testing.assert_close(made.keys, sent.keys)
    assert not torch.equal(made.keys, raw.keys)


def test_rounds_attack_what_no_fit_has_seen(
    agent: HFBackend, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[set[str], Emphasis, int]] = []
    attacks: list[set[str]] = []
    recovered, fit = Attackers.recovered, fit_detector

    def attacked(self: Attackers, guard: Any, pairs: Any, victims: Any) -> Any:
        attacks.append({r.scenario_id for r in victims.records})
        assert attacks[-1].isdisjoint(fits[-1][0])
        assert {r.scenario_id for r in pairs.records} <= fits[-1][0]
        return recovered(self, guard, pairs, victims)

    def fitted(module: Any, data: Any, config: Any, say: Any, emphasis: Emphasis) -> None:
        hard = sum(len(d.hard_of(i)) for d in data for i in range(len(d.records)))
        fits.append(({r.scenario_id for d in data for r in d.records}, emphasis, hard))
        fit(module, data, config, say, emphasis)

    monkeypatch.setattr(Attackers, "recovered", attacked)
    monkeypatch.setattr(detector_rounds, "fit_detector", fitted)
    blind = replace(FIT, thresholds=(9.0, 9.0))  # so that some values stand in clear
    _, done = play(replace(ROUNDS, budget_strength=0.5), staged(agent, read, fit=blind), [read[1]])
    assert len(fits) == 3
    assert len(attacks) == 2
    assert fits[0][0] < fits[1][0] < fits[2][0] == {r.scenario_id for r in read[1].records}
    assert attacks[0] <= fits[1][0]
    assert [e["round"] for e in done] == [0, 1, 2]
    assert [hard for *_, hard in fits] == [
        0,
        done[1]["recovered"],
        done[1]["recovered"] + done[2]["recovered"],
    ]  # what was recovered once stays hard
    for entry, (_, emphasis, _) in zip(done[1:], fits[1:], strict=True):
        assert emphasis.hard_weight == ROUNDS.hard_weight
        assert entry["budgets"] == emphasis.budgets
        assert 0 < entry["asked"]
        assert 0 < entry["recovered"] <= entry["asked"]
        counts = entry["categories"].values()
        assert sum(c["asked"] for c in counts) == entry["asked"]


def test_what_is_in_clear_is_recovered_and_nothing_that_is_hidden(
    agent: HFBackend, read: Any
) -> None:
    """A guard that finds one category alone: inversion names every other value."""
    module = staged(agent, read).module
    low, high = -1e6, 1e6
    options = module.options() | {"thresholds": [low, *[high] * (len(CATEGORIES) - 1)]}
    guard = TwinGuard.build(module.shape, len(CATEGORIES), options)
    guard.load_state_dict(module.state_dict())
    shown = TwinGuard.build(
        module.shape, len(CATEGORIES), options | {"thresholds": [high] * len(CATEGORIES)}
    )
    shown.load_state_dict(module.state_dict())
    attackers = Attackers(agent, RoundsConfig().attacks)
    pairs, victims = read[1].part(range(4)), read[2].part(range(4))
    hidden = attackers.recovered(guard, pairs, victims)
    clear = attackers.recovered(shown, pairs, victims)
    assert all(code == RECOVERED for row in clear for code in row)
    assert sum(map(len, clear)) > 0
    first = CATEGORIES[0]
    for record, row in zip(victims.records, hidden, strict=True):
        if first in record.forbid:  # all tokens belong to it
            assert RECOVERED not in row


def test_a_recovered_value_weighs_more_and_no_other(read: Any) -> None:
    source: ReadRecords = read[1]
    record = next(r for r in source.records if sum(1 for _ in r.categorised()) > 1)
    spans = [s for s, _ in record.categorised()]
    ones = torch.ones(1, len(record.ids), len(CATEGORIES))
    weight = Emphasis(hard_weight=4.0).weighted(ones, [record], [spans[:1]])
    expected = ones.clone()
    chosen = spans[0]
    assert chosen.category is not None
    expected[0, chosen.start : chosen.end, CATEGORIES.index(chosen.category)] = 4.0
    assert torch.equal(weight, expected)
    assert torch.equal(Emphasis(hard_weight=4.0).weighted(ones, [record], [()]), ones)


def test_parts_share_no_scenario_and_none_is_empty(read: Any) -> None:
    records: list[TokenRecord] = list(read[1].records)
    parts = divided(records, 4, seed=3)
    assert sorted(i for at in parts for i in at) == list(range(len(records)))
    names = [{records[i].scenario_id for i in at} for at in parts]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names))
    assert divided(records, 4, seed=3) == parts != divided(records, 4, seed=4)


def test_budgets_rise_with_what_was_recovered_and_keep_their_mean(read: Any) -> None:
    sources = [read[1].records, read[2].records]
    names = sorted({str(s.category) for d in sources for r in d for s, _ in r.categorised()})
    asked = dict.fromkeys(names, 10)
    recovered = {name: i for i, name in enumerate(names)}
    found = recovery_budgets(sources, asked, recovered, 0.6)
    assert [found[n] for n in names] == sorted(found.values())
    assert found[names[0]] == pytest.approx(0.4)
    assert found[names[-1]] > 1
    mean = total = 0.0
    for records in sources:  # each source is drawn from as often
        for r in records:
            for s, _ in r.categorised():
                mean += found[str(s.category)] / len(records)
                total += 1 / len(records)
    assert mean / total == pytest.approx(1.0)
    assert recovery_budgets(sources, asked, recovered, 0.0) == {}
    equal = recovery_budgets(sources, asked, dict.fromkeys(names, 3), 0.6)
    assert set(equal.values()) == {1.0}
    shares = {"a": 0.7, "b": 0.3}
    assert category_weights(shares, 0.5, shares) == category_weights(shares, 0.5)


def test_labels_are_uncertain_where_the_student_is_far() -> None:
    logits = torch.tensor([[8.0, 4.6, -3.0, -8.0], [-8.0, -4.6, 3.0, 8.0]])
    labels = torch.tensor([[1.0] * 4, [0.0] * 4])
    target = uncertain_labels(logits, labels, nats=1.0)
    assert torch.equal(target[:, :2], labels[:, :2])
    far = target[0, 2:]
    assert bool(((far > 0.5) & (far < 1)).all())
    assert far[1] < far[0]  # the farther the less certain
    torch.testing.assert_close(target[1], 1 - target[0])
    assert torch.equal(uncertain_labels(logits, labels, nats=100.0), labels)
    moved = logits.clone().requires_grad_()
    assert not Emphasis(uncertain_nats=1.0).target(moved, labels).requires_grad
    assert Emphasis().target(moved, labels) is labels


def test_a_round_that_costs_more_is_taken_back(agent: HFBackend, read: Any) -> None:
    train = read[1]
    few = train.part(divided(train.records, 2, FIT.seed)[0])  # what the first fit sees
    well = replace(FIT, steps=100, batch=8, dropout=0.0)
    stage = staged(agent, read, fit=well, validation=few)
    first: list[dict[str, torch.Tensor]] = []

    def watched() -> TwinGuard:
        first.append(weights(stage.module))
        return stage.choose()

    absurd = replace(ROUNDS, lr=0.5, count=1, rollback_slack=0.0)
    guard, done = play(absurd, replace(stage, choose=watched), [train])
    assert done[1]["validation_cost"] > done[0]["validation_cost"]
    assert done[1]["rolled_back"]
    assert not same(first[0], first[1])
    assert same(first[0], weights(guard))
    other = staged(agent, read, fit=well, validation=few)
    kept, done = play(replace(absurd, rollback_slack=None), other, [train])
    assert not done[1]["rolled_back"]
    assert same(first[1], weights(kept))


def test_a_run_that_was_ended_goes_on_to_the_same_guard(
    agent: HFBackend, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = replace(ROUNDS, budget_strength=0.5, uncertain_nats=1.0, rollback_slack=0.1)
    guard, done = play(rounds, staged(agent, read, tmp_path), [read[1]])
    files = sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    assert len(files) == 5  # three fits and two attacks
    files[-1].unlink()  # ended in the last fit
    fits: list[int] = []
    fit = fit_detector

    def counted(*args: Any) -> None:
        fits.append(1)
        fit(*args)

    def never(*args: Any) -> Any:
        raise AssertionError("attacked again")

    monkeypatch.setattr(detector_rounds, "fit_detector", counted)
    monkeypatch.setattr(Attackers, "recovered", never)
    again, told = play(rounds, staged(agent, read, tmp_path), [read[1]])
    assert fits == [1]
    assert told == done
    assert same(weights(again), weights(guard))
    assert again.options() == guard.options()


RUN = DetectorRun(
    model="nano",
    sources=(DataConfig("generator", seed=5, train_records=24, test_records=6),),
    options=OPTIONS,
    detector=FIT,
    rounds=replace(ROUNDS, count=1),
)


def test_card_and_summary_tell_every_round(tmp_path: Path) -> None:
    said: list[str] = []
    summary = train_detector(RUN, tmp_path, "lcguard detect train", said.append)
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == summary["rounds"]
    card = FrozenGuard.from_pretrained(tmp_path / "guard").card
    assert card.training is not None
    assert card.training["rounds"] == summary["rounds"]
    first, entry = summary["rounds"]
    assert first["asked"] == 0
    (line,) = (s for s in said if s.startswith("round 1"))
    assert f"{entry['recovered']} of {entry['asked']} recovered" in line
    assert (tmp_path / "config.yaml").read_text().count("rounds:") == 1
    assert load_config(DetectorRun, tmp_path / "config.yaml") == RUN


def test_a_quick_run_takes_a_quarter_of_a_round() -> None:
    quick = quickened(replace(RUN, rounds=RoundsConfig(count=1))).rounds
    assert (quick.steps, quick.records, quick.count) == (38, 24, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": -1}, "rounds.count = -1: use 0 or more"),
        ({"steps": 0}, "rounds.steps = 0: use 1 or more"),
        ({"records": 0}, "rounds.records = 0: use 1 or more"),
        ({"lr": 0.0}, "rounds.lr = 0.0: use a number above 0"),
        ({"hard_weight": 0.0}, "rounds.hard_weight = 0.0: use a number above 0"),
        ({"budget_strength": 1.5}, "rounds.budget_strength = 1.5: use 0 to 1"),
        ({"uncertain_nats": -1.0}, r"rounds.uncertain_nats = -1.0: use 0 \(off\) or more"),
        ({"rollback_slack": -0.1}, "rounds.rollback_slack = -0.1: use 0 or more, or null"),
    ],
)
def test_wrong_settings(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(ROUNDS, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attacks": ()}, "rounds.attacks is empty"),
        ({"attacks": (AttackSpec("a", "invert"),)}, "attack 'invert' is unknown: did you mean"),
        ({"attacks": (AttackSpec("a", "decoder", warm=True),)}, "'a' starts warm"),
        ({"count": 30}, "training scenarios cannot be divided into 31 parts"),
    ],
)
def test_wrong_rounds_of_a_run(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = replace(RUN, rounds=replace(ROUNDS, **change))
    with pytest.raises(ValueError, match=said):
        train_detector(run, tmp_path, "lcguard detect train", lambda text: None)
