"""The optimal attacker: first where he can be, right as often as his posterior says, blind where
nothing is sent."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.scenarios.schema import sample_value
from lcguard.attacks.base import Knowledge
from lcguard.attacks.candidates import Candidates
from lcguard.attacks.likelihood import LikelihoodAttack
from lcguard.categories import CATEGORIES
from lcguard.evaluation.lists import list_figures
from lcguard.evaluation.multihop_plan import HopGuard, MultihopConfig, TopologySpec
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.run import evaluate, load
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.protocols import AttackData, Guess, Secret
from lcguard.records import TokenRecord
from lcguard.training.dataset import attack_data, blind, guard_all
from lcguard.training.fit_erasure import fit_erasure
from lcguard.training.joint import join_data
from scripts.measure_draws import first_rates
from tests.fixtures import World


def guard_of(world: World, name: str, fit: bool = False, **options: Any) -> FrozenGuard:
    module = guard_class(name).build(KVShape(*world.source.shape), len(CATEGORIES), options)
    if fit:
        fit_erasure(module, world.records[:40], world.source)
    module.fit_statistics(world.source.prefill([r.ids for r in world.records[:40]]))
    return FrozenGuard(module)


def data_of(
    world: World, records: Sequence[TokenRecord], guard: FrozenGuard | None = None, seed: int = 0
) -> AttackData:
    kv = world.source.prefill([r.ids for r in records])
    if guard is not None:
        kv = guard_all(guard, records, kv, world.source, world.special, seed=seed)
    return attack_data(records, kv, world.special)


def attack_of(world: World, guard: FrozenGuard | None, **options: Any) -> LikelihoodAttack:
    attack = LikelihoodAttack.build({"lists": (10,), "max_records": None, **options})
    attack.equip(
        Knowledge(world.source, world.decode, guard, None, world.encoder.ids, sample_value)
    )
    return attack


def guesses(
    world: World,
    guard: FrozenGuard | None,
    n: int,
    records: Sequence[TokenRecord] = (),
    **options: Any,
) -> list[Guess]:
    attack = attack_of(world, guard, **options).fit(data_of(world, world.records[:8], guard))
    return attack.recover(data_of(world, records or world.others[:n], guard, 1))


def won(found: Sequence[Guess], size: int = 10) -> float:
    return sum(g.lists[size].rank == 1 for g in found if g.lists) / len(found)


def chance(found: Sequence[Guess], size: int = 10) -> float:
    return sum(1 / g.lists[size].size for g in found if g.lists) / len(found)


@pytest.mark.parametrize("name", ["none", "identity", "residual", "cloak"])
def test_without_noise_the_true_value_is_first(world: World, name: str) -> None:
    options = {"cloak": {"key": "5a" * 32, "block": 3}, "residual": {"bottleneck": 4}}
    guard = None if name == "none" else guard_of(world, name, **options.get(name, {}))
    found = guesses(world, guard, 6)
    assert won(found) == 1
    for g in found:
        assert g.lists is not None
        assert g.lists[10].nats == pytest.approx(math.log(g.lists[10].size), abs=1e-6)


@pytest.mark.parametrize("noise", [30.0, 45.0])
def test_the_posterior_is_calibrated(world: World, noise: float) -> None:
    """``p(z) / p(z | truth)`` is 1 on average, whatever the candidates: a wrong mean, or noise of
    another size, would bend it."""
    found = guesses(world, guard_of(world, "gaussian", noise=noise), 60)
    odds = [math.exp(-g.lists[10].nats) for g in found if g.lists]
    assert sum(odds) / len(odds) == pytest.approx(1, abs=0.25)
    assert chance(found) + 0.1 < won(found) < 0.95


def test_noise_that_no_guard_states_is_measured(world: World) -> None:
    parts = [
        {"guard": "erasure", "options": {"values": 1}},
        {"guard": "gaussian", "options": {"noise": 0.3}},
    ]
    guard = guard_of(world, "compose", fit=True, parts=parts)
    attack = attack_of(world, guard).fit(data_of(world, world.records[:8], guard))
    assert attack.noise == pytest.approx(0.3, rel=0.3)
    assert won(attack.recover(data_of(world, world.others[:4], guard, 1))) == 1


def test_redaction_is_blind_by_construction(world: World) -> None:
    found = guesses(world, guard_of(world, "redact"), 60)
    for g in found:
        assert g.lists is not None
        assert g.lists[10].nats == 0  # the same segment for all of them, to the last bit
    assert won(found) == pytest.approx(chance(found), abs=0.1)


def test_a_missed_occurrence_is_a_win(world: World) -> None:
    """The value stands again where nobody marked it."""
    records = [
        replace(r, ids=(*r.ids, *r.ids[s.start : s.end]), spans=(s,))
        for r in world.others[:8]
        for s in r.spans[:1]
    ]
    guard = guard_of(world, "redact")
    assert won(guesses(world, guard, 0, records)) == 1


def test_foreign_segments_give_chance(world: World) -> None:
    own, others = data_of(world, world.records[:30]), data_of(world, world.others)
    attack = attack_of(world, None).fit(blind(own))
    found = attack.recover(blind(others, 1))
    assert won(found) == pytest.approx(chance(found), abs=0.12)


def test_ranks_of_lists_that_hold_each_other(world: World) -> None:
    found = guesses(world, guard_of(world, "gaussian", noise=6.0), 12, lists=(3, 10, 30))
    for g in found:
        assert g.lists is not None
        small, middle, large = (g.lists[n] for n in (3, 10, 30))
        assert 1 <= small.rank <= middle.rank <= large.rank <= large.size <= 30
    truth = [s.ids for r in world.others[:12] for s in r.secrets()]
    same = [g.ids == ids for g, ids in zip(found, truth, strict=True)]
    assert same == [g.lists[30].rank == 1 for g in found if g.lists]


def test_several_draws_tell_more(world: World) -> None:
    guard, record = guard_of(world, "gaussian", noise=45.0), world.others[:10]
    attack = attack_of(world, guard).fit(data_of(world, world.records[:8], guard))
    draws = [data_of(world, record, guard, seed) for seed in range(16)]
    gained = {1: 0.0, 16: 0.0}
    for i in range(len(record)):
        seen = [attack.observed(d, i) for d in draws]
        for n in gained:
            mean = sum(seen[1:n], seen[0]) / n
            g = attack.rank(draws[0], i, 0, mean, [10], n)
            gained[n] += g.lists[10].nats if g.lists else 0
    assert gained[16] > gained[1] + 3


def test_behind_consumed_segments(world: World) -> None:
    records = world.others[:3]
    on = world.source.prefill([[5, 6, 7, 8]] * 3)
    kv = world.source.prefill([r.ids for r in records], on=on)
    data = attack_data(records, kv, world.special)
    behind = replace(data, on=on)
    attack = attack_of(world, None).fit(data_of(world, world.records[:8]))
    assert won(attack.recover(behind)) == 1
    with pytest.raises(ValueError, match="not joint ones"):
        attack.recover(join_data([data, data], ["a", "b"]))


def test_what_cannot_be_is_refused(world: World) -> None:
    for lists in ((), (1,), (100, 10)):
        with pytest.raises(ValueError, match="give ascending sizes of 2 or more"):
            attack_of(world, None, lists=lists).fit(data_of(world, world.records[:2]))
    with pytest.raises(ValueError, match="batch 0 must be at least 1"):
        attack_of(world, None, batch=0).fit(data_of(world, world.records[:2]))


def test_draws_of_one_record_add_up() -> None:
    """Two candidates at distance d, n draws: the normal distribution at half of root n times d."""
    means = torch.zeros(3, 4, 5)
    means[1] += 0.2
    means[2, 0, 0] = 50.0  # never taken for the true one
    apart = float((means[1] - means[0]).norm())
    found = first_rates(means, (2, 3), (1, 4, 16), 0)
    for row, n in zip(found.tolist(), (1, 4, 16), strict=True):
        right = 0.5 * (1 + math.erf(n**0.5 * apart / 2 / 2**0.5))
        assert row == pytest.approx([right, right], abs=0.04)


# -- the lists


def lists_of(world: World, sample: Any, own: Sequence[Secret] = ()) -> Candidates:
    return Candidates([own], world.decode, world.encoder.ids, sample)


def secret_of(world: World, text: str, field: str) -> Secret:
    ids = tuple(world.encoder.ids(text))
    return Secret("government_id", field, ids, (0, len(ids)))


def test_lists_are_distinct_and_of_the_true_length(world: World) -> None:
    secret = secret_of(world, " 912-55-1029", "ssn")
    found = lists_of(world, sample_value).draw(random.Random(0), secret, 200)
    assert found[0] == secret.ids
    assert len(set(found)) == len(found) == 200
    assert {len(v) for v in found} == {len(secret.ids)}
    texts = [world.decode(v) for v in found]
    assert all(t.startswith(" ") and t[4] == "-" for t in texts if "CANARY" not in t)


def test_fields_that_no_generator_knows(world: World) -> None:
    """Values of the attacker's own records, and numbers of the same form."""
    number = secret_of(world, " K-1234", "badge")
    found = lists_of(world, sample_value).draw(random.Random(0), number, 50)
    assert len(found) == 50
    assert all(world.decode(v).startswith(" K-") for v in found)
    word = secret_of(world, " red", "colour")
    own = [secret_of(world, t, "colour") for t in (" red", " tan", " a very long colour")]
    few = lists_of(world, sample_value, own).draw(random.Random(0), word, 50)
    assert all(len(v) == len(word.ids) for v in few)
    assert 1 <= len(few) <= 2


def test_the_length_alone_is_counted_apart(world: World) -> None:
    words = lists_of(world, lambda field, rng: rng.choice(("a", "b", "c", "a b c d e f g h")))
    short, long = (secret_of(world, t, "x") for t in (" a", " a b c d e f g h"))
    assert words.length_nats(random.Random(0), short) == pytest.approx(math.log(4 / 3), abs=0.1)
    assert words.length_nats(random.Random(0), long) == pytest.approx(math.log(4), abs=0.4)


# -- in an evaluation


def attempt(field: str, category: str, ranks: dict[str, tuple[int, int]]) -> Attempt:
    lists = {n: {"size": size, "rank": rank, "nats": 0.5} for n, (size, rank) in ranks.items()}
    return Attempt(
        scenario="s",
        edge="a->b",
        record=field,
        guard="gate",
        policy="edge",
        attack="likelihood",
        seed=0,
        category=category,
        field=field,
        kind="likelihood",
        outcome=Outcome.RESISTED,
        extra={"lists": lists, "length_nats": 0.3},
    )


def test_figures_by_list() -> None:
    seen = [
        attempt("ssn", "government_id", {"10": (10, 1), "100": (100, 7)}),
        attempt("ssn2", "government_id", {"10": (10, 2), "100": (100, 1)}),
        attempt("diagnosis", "health", {"10": (5, 1), "100": (5, 1)}),
    ]
    found = list_figures(seen, [])
    assert found["10"]["asr"] == pytest.approx((0.5 + 1) / 2)
    assert found["10"]["floor"] == pytest.approx((0.1 + 0.2) / 2)
    assert found["100"]["floor"] == pytest.approx((0.01 + 0.2) / 2)
    assert found["100"]["rank_median"] == 1
    assert found["100"]["shorter"] == pytest.approx(1 / 3)
    assert found["length_nats"] == pytest.approx(0.3)
    assert found["100"]["by_category"]["government_id"]["n"] == 2
    assert list_figures([], []) == {}


CONFIG = EvalConfig(
    data=DataConfig(seed=31, train_records=60, test_records=8),
    guards=(
        GuardSpec("identity", guard="identity"),
        GuardSpec("redact-fixed-length", guard="redact", fixed_length=True),
    ),
    attacks=(
        AttackSpec("probe", "probe", {"fit": {"steps": 2}}),
        AttackSpec("likelihood", "likelihood", {"lists": (5, 10), "max_records": 3}),
    ),
    seeds=(0, 1),
    injection=False,
    explain=0,
)


def test_it_stands_apart_in_the_report_and_resumes(tmp_path: Path) -> None:
    report = evaluate(CONFIG, tmp_path, "test")
    identity, redact = report["results"]
    assert identity["likelihood"]["10"]["asr"] == 1
    assert identity["likelihood"]["10"]["blind"] < 0.7
    assert redact["likelihood"]["10"]["nats"] == 0
    assert set(identity["asr_fresh_by_attack"]) == {"probe"}  # its floor is another
    text = (tmp_path / "report.md").read_text()
    assert "The optimal attacker" in text
    before = (tmp_path / "attempts.jsonl").read_bytes()
    assert evaluate(CONFIG, tmp_path, "test")["results"][1]["likelihood"] == redact["likelihood"]
    assert (tmp_path / "attempts.jsonl").read_bytes() == before


def test_it_needs_a_writer_of_values_beside_it() -> None:
    with pytest.raises(ValueError, match="beside 'likelihood' name one that writes values"):
        replace(CONFIG, guards=(GuardSpec("gate", path="nano:gate", attacks=("likelihood",)),))


def test_several_hops_refuse_it() -> None:
    config = MultihopConfig(
        topologies=(TopologySpec("chain-2", "chain", 2),),
        guards=(HopGuard("identity", guard="identity"),),
        attacks=(AttackSpec("likelihood", "likelihood"),),
    )
    with pytest.raises(ValueError, match="leave it out here"):
        load(config)
