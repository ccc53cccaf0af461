"""No attacker names a secret more often than the ceiling says, on channels whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, Rewrite
from lcguard.protocols import KVBatch, Mask
from lcguard.records import TokenRecord, TokenSpan
from lcguard.rule import Rule
from lcguard.tokens import REPEAT
from lcguard.training.bounded_mean import mean_upper_bound
from lcguard.training.known_values import (
    Law,
    RecordValues,
    SampledValues,
    written_otherwise,
)
from lcguard.training.secret_ceiling import (
    GUESSES,
    Seen,
    chosen_secrets,
    secret_ceilings,
    see,
    summary,
)
from tests.fixtures import World

SHAPE = KVShape(1, 1, 8)
VALUES = 256
"""A secret is one token of so many, all as likely: 8 bits."""
NOISE = 0.2
FAR = 40.0
"""Noise between means that are told apart for certain."""


class Shown:
    """A model of one layer whose entries spell out their token."""

    shape = SHAPE

    def prefill(self, contexts: Sequence[Sequence[int]]) -> KVBatch:
        ids = torch.tensor(contexts)
        bits = (ids[:, None, None, :, None] >> torch.arange(8)) & 1
        return KVBatch(bits.float(), bits.float(), torch.ones_like(ids, dtype=torch.bool))


class Channel(GuardModule):
    """Sends, of every token, a mean that depends on it alone: ``table [256, channels]``, in units
    of the noise."""

    @dataclass(frozen=True)
    class Config(GuardModule.Config):
        noise: float = NOISE

    def __init__(self, table: Tensor) -> None:
        super().__init__(SHAPE, len(CATEGORIES))
        self.table = table

    def rewrite(self, z: Tensor, valid: Tensor, mask: Mask) -> Rewrite:
        token = (z[:, :, 0, 0].long() << torch.arange(8)).sum(-1)
        mean = torch.zeros_like(z)
        mean[:, :, 0, 0, : self.table.shape[1]] = self.table[token] * NOISE
        return Rewrite(mean, torch.zeros(valid.shape))


def leaks_bits(k: int) -> Channel:
    """Tells the lower k bits of a token for certain, and nothing else."""
    return Channel((torch.arange(VALUES) % 2**k)[:, None] * FAR)


class Uniform(Law):
    """A law that is known exactly."""

    def guess(self, risk: float) -> float:
        return 1 / len(self.values)


class Known:
    """The law of every secret: so many values, all as likely."""

    def __init__(self, n: int = VALUES) -> None:
        self.law = Uniform([(v,) for v in range(n)])

    def of(self, record: TokenRecord, span: TokenSpan, hold_band: bool) -> Law:
        return self.law


def records(n: int, values: int = VALUES, seed: int = 0) -> list[TokenRecord]:
    """Each of three tokens, the middle one its secret."""
    rng, out = random.Random(f"records/{seed}"), []
    for i in range(n):
        ids = (7, rng.randrange(values), 9)
        span = TokenSpan(1, 2, "code", CATEGORIES[i % 2], None, True)
        name = f"r{seed}-{i}"
        out.append(TokenRecord(name, name, "e", "t", "v", ids, (span,), (), Rule(CATEGORIES)))
    return out


def ceilings(
    module: GuardModule, n: int = 120, values: int = VALUES, seed: int = 0, **options: Any
) -> dict[str, Any]:
    source: Any = Shown()
    given = records(n, values, seed)
    return secret_ceilings(module, given, source, Known(values), seed=seed, **options)


def at(found: dict[str, Any], least_guess: float) -> dict[str, float]:
    (row,) = [c for c in found["ceilings"] if c["least_guess"] == least_guess]
    return row


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [0, 1, 2, 4, 8])
def test_a_guard_that_leaks_k_bits(k: int, seed: int) -> None:
    """Who is told k bits of 8 for certain names the value 2^k / 2^8 of the time, and no ceiling is
    below that: for k = 8 it is 1."""
    truth = 2**k / VALUES
    found = ceilings(leaks_bits(k), seed=seed)
    lowest = at(found, 0.001)
    assert lowest["guess"] == pytest.approx(1 / VALUES)
    assert truth <= lowest["upper"]
    # of figures that each are unbiased, so it is the mean that is bounded, not by its slack alone
    assert truth <= lowest["ceiling"] + 0.02
    for row in (*found["ceilings"], *found["by_category"].values()):
        assert row["upper"] >= min(1.0, row["guess"] * 2**k)  # of whoever guesses better
        assert row["upper"] >= row["ceiling"] or row["upper"] == 1
    assert found["listed"]["upper"] >= found["listed"]["asr"] >= found["listed"]["chance"] - 1e-9


def test_what_leaks_nothing_is_certified_as_that() -> None:
    """Ceilings are not vacuous: nothing leaks, and nothing is left but the guess and the sample."""
    found = ceilings(leaks_bits(0), n=400)
    for row in found["ceilings"]:
        assert row["ceiling"] == pytest.approx(row["guess"])
        assert row["upper"] <= row["guess"] + 0.02
    assert found["pair_nats"]["max"] == 0
    assert found["listed"]["asr"] == pytest.approx(found["listed"]["chance"])
    # one bit is worth one bit, where the divergence between pairs is without use
    one = ceilings(leaks_bits(1), n=400)
    assert one["pair_nats"]["mean"] > 100
    assert at(one, 0.01)["ceiling"] < 0.05


@pytest.mark.parametrize("apart", [0.5, 1.0, 2.0, 4.0])
def test_two_values_are_told_apart_as_neyman_and_pearson_say(apart: float) -> None:
    """The optimal attacker on two equally likely values at a distance d is right Phi(d / 2) of the
    time. The ceiling is that, and it is what the list measures."""
    table = torch.zeros(VALUES, 1)
    table[1] = apart
    found = ceilings(Channel(table), n=500, values=2, references=30)
    truth = NormalDist().cdf(apart / 2)
    for row in found["ceilings"]:
        assert row["guess"] == 0.5
        assert row["ceiling"] == pytest.approx(truth, abs=0.06)
        assert row["upper"] >= truth
    assert found["listed"]["candidates"] == 2
    assert found["listed"]["asr"] == pytest.approx(truth, abs=0.02)
    assert found["listed"]["upper"] >= truth


def optimal(table: Tensor, values: int, draws: int = 4000) -> float:
    """Success of the likeliest of ``values`` equally likely ones, by simulation."""
    rng = np.random.default_rng(1)
    means = table[:values].numpy()
    secret = rng.integers(values, size=draws)
    seen = means[secret] + rng.standard_normal((draws, means.shape[1]))
    distance = ((seen[:, None] - means) ** 2).sum(-1)
    return float((distance.argmin(1) == secret).mean())


@pytest.mark.parametrize("seed", range(6))
def test_no_ceiling_is_below_the_optimal_attacker(seed: int) -> None:
    """Channels of every kind: means at random, some of them far out, in one to eight dimensions."""
    rng = torch.Generator().manual_seed(seed)
    width = (1, 2, 4, 8)[seed % 4]
    table = torch.randn(VALUES, width, generator=rng)
    table *= torch.rand(VALUES, 1, generator=rng).pow(-0.5) * (0.2, 1.0)[seed % 2]  # heavy tails
    values = (64, 256)[seed % 2]
    found, truth = ceilings(Channel(table), n=200, values=values, seed=seed), optimal(table, values)
    lowest = at(found, 0.001)
    assert lowest["upper"] >= truth
    assert lowest["ceiling"] >= truth - 0.02  # twice the simulation's error
    for row in found["ceilings"]:
        assert row["upper"] >= truth


def test_an_unguarded_value_is_given_up() -> None:
    found = ceilings(leaks_bits(8), n=60)
    for row in found["ceilings"]:
        assert row["upper"] == 1.0
        assert row["ceiling"] > 0.9
    assert found["listed"]["asr"] == 1.0


def test_figures_are_of_the_noise_that_is_drawn() -> None:
    """The likelihood ratios of real draws average to what the law says: E_P Q / P = 1, for Q a
    reference and for their centre."""
    source: Any = Shown()
    record = records(1)[0]
    table = torch.randn(VALUES, 8, generator=torch.Generator().manual_seed(0)) * 0.4
    law, span = Known().law, record.spans[0]
    seen = [see(Channel(table), record, span, law, source, 6, f"{i}") for i in range(400)]
    ratios = np.concatenate([np.exp(s.log_ratio(0, np.arange(1, 7), s.dots)) for s in seen])
    assert ratios.mean() == pytest.approx(1.0, abs=0.05)
    nats = np.mean([-s.ahead(0, np.arange(1, 7), s.dots).mean() for s in seen])
    assert nats == pytest.approx(np.mean([s.pair_nats().mean() for s in seen]), abs=0.02)


def test_the_choice_of_l_sees_nothing_of_the_secret() -> None:
    """Or the figure would not be unbiased: another secret, or other noise, another figure, but the
    same l and references."""
    source: Any = Shown()
    table = torch.randn(VALUES, 4, generator=torch.Generator().manual_seed(2))
    first, second = records(2, seed=5)
    seen = [
        see(Channel(table), r, r.spans[0], Known().law, source, 20, "same")
        for r in (first, replace(second, ids=(7, first.ids[1] ^ 1, 9)))
    ]
    np.testing.assert_allclose(seen[0].gram[1:, 1:], seen[1].gram[1:, 1:], atol=1e-9)
    lost = seen[0].lost("x")
    assert seen[0].figure(0.01, lost) != seen[1].figure(0.01, lost)
    changed = replace(seen[0], dots=seen[0].dots + 1.0)
    for other in (changed, seen[1]):
        np.testing.assert_allclose(other.lost("x"), seen[0].lost("x"), atol=1e-9)


def test_one_secret_of_each_scenario_is_seen() -> None:
    """Records of one scenario are not independent."""
    rows = [replace(r, scenario_id=f"s{i // 3}") for i, r in enumerate(records(30))]
    found = chosen_secrets(rows, 400, 0)
    assert len(found) == len({r.scenario_id for r, _ in found}) == 10
    assert len(chosen_secrets(rows, 4, 0)) == 4
    assert chosen_secrets(rows, 4, 0) == chosen_secrets(rows, 4, 0) != chosen_secrets(rows, 4, 1)
    none = [replace(r, rule=Rule()) for r in rows]
    source: Any = Shown()
    with pytest.raises(ValueError, match="nothing to certify"):
        secret_ceilings(leaks_bits(0), none, source, Known())


# -- what is known of values


def test_a_value_of_which_little_is_known_counts_as_told() -> None:
    """Fail closed: no ceiling from a law that nobody has seen."""
    assert Law([(1,)] * 19).guess(0.1) == Law([]).guess(0.1) == Law([(1,)] * 50).guess(0.1) == 1
    source: Any = Shown()

    class Nothing:
        def of(self, record: TokenRecord, span: TokenSpan, hold_band: bool) -> Law:
            return Law([])

    found = secret_ceilings(leaks_bits(0), records(8), source, Nothing())
    assert {c["ceiling"] for c in found["ceilings"]} == {c["upper"] for c in found["ceilings"]}
    assert at(found, GUESSES[0])["ceiling"] == 1.0
    assert found["unknown"] == 8
    assert found["listed"]["asr"] is None
    assert found["pair_nats"] == {}


def test_the_blind_guess_is_bounded_from_draws() -> None:
    """Not below the truth but for the risk, and close to it where there are many."""
    rng = random.Random(0)
    below = 0
    for _ in range(300):
        law = Law([(min(rng.randrange(20), 15),) for _ in range(200)])  # the last one: a quarter
        below += law.guess(0.1) < 0.25
    assert below <= 0.1 * 300
    assert Law([(i % 4,) for i in range(20_000)]).guess(0.01) == pytest.approx(0.25, abs=0.02)


def test_values_come_from_records_or_from_a_sampler(world: World) -> None:
    record = world.others[0]
    span = next(s for s in record.spans if s.category is not None)
    own = record.ids[span.start : span.end]
    law = RecordValues([record] * 30).of(record, span, False)
    assert [*law.values] == [own] * 30
    assert not RecordValues([record]).of(record, replace(span, field="other"), False).values
    low, high = (replace(record, spans=(replace(span, band=b),)) for b in ("low", "high"))
    known = RecordValues([low, high, high])
    found = [len(known.of(record, replace(span, band=b), True).values) for b in ("low", "high")]
    assert found == [1, 2]
    assert len(known.of(record, replace(span, band="low"), False).values) == 3

    def sample(kind: str, field: str, rng: random.Random) -> tuple[str, str | None] | None:
        assert kind == record.record_type
        return (rng.choice(("ab", "cd", "efg")), "x") if field == "f" else None

    encode, decode = (lambda text: [ord(c) for c in text]), (lambda ids: "".join(map(chr, ids)))
    sampled = SampledValues(sample, encode, decode, draws=300)
    spaced = replace(record, ids=(32, 97, 98), spans=())
    one = TokenSpan(0, 3, "f", "person", None, True)
    drawn = sampled.of(spaced, one, False)
    assert set(drawn.values) == {(32, 97, 98), (32, 99, 100)}  # as long, with the same lead
    assert 0.5 < drawn.guess(0.01) < 0.65
    assert sampled.of(spaced, replace(one, band="x"), True).values == drawn.values
    assert not sampled.of(spaced, replace(one, band="y"), True).values
    assert not sampled.of(spaced, replace(one, field="g"), False).values


def test_a_value_that_stands_in_another_spelling_is_not_certified() -> None:
    """It would be told by the rest of the record."""
    (record,) = records(1)
    (span,) = record.spans
    again = replace(span, start=2, end=3, field=REPEAT)
    spelled = replace(record, spans=(span, again))
    assert written_otherwise(spelled, span)
    assert not written_otherwise(record, span)
    same = replace(spelled, ids=(7, 5, 5))
    assert not written_otherwise(same, span)
    source: Any = Shown()
    found = secret_ceilings(leaks_bits(0), [spelled], source, Known())
    assert found["unknown"] == 1
    # the same tokens change with the secret, wherever they stand
    seen = see(leaks_bits(8), same, span, Known().law, source, 4, "x")
    alone = see(leaks_bits(8), replace(same, spans=(span,)), span, Known().law, source, 4, "x")
    assert seen.pair_nats() == pytest.approx(2 * alone.pair_nats())


# -- the bound on a mean


@pytest.mark.parametrize("mean", [0.01, 0.15, 0.5, 0.97])
@pytest.mark.parametrize("n", [5, 60, 400])
def test_the_bound_on_a_mean_holds(mean: float, n: int) -> None:
    """For coins, the worst law within 0..1, at any number of them."""
    rng = np.random.default_rng(0)
    coins = (rng.random((200, n)) < mean).astype(float)
    missed = sum(mean_upper_bound(row.tolist(), 0.9) < mean for row in coins)
    assert missed <= 0.1 * 200
    assert mean_upper_bound(coins[0].tolist(), 0.9) >= coins[0].mean()


def test_the_bound_on_a_mean_is_close() -> None:
    assert mean_upper_bound([0.0] * 400, 0.95) < 0.012  # 3 / n is the least there can be: .0075
    assert mean_upper_bound([0.1, 0.12] * 200, 0.95) < 0.125  # of small variance
    assert mean_upper_bound([], 0.95) == 1.0
    for bad, match in (([-0.1], "within 0..1"), ([math.nan], "within 0..1"), ([1.1], "0..1")):
        with pytest.raises(ValueError, match=match):
            mean_upper_bound(bad, 0.95)
    with pytest.raises(ValueError, match="level="):
        mean_upper_bound([0.1], 1.0)


def test_a_summary_is_the_same_every_time() -> None:
    seen = Seen("person", Known().law, np.eye(5), np.zeros((8, 5)), (1, 2))
    assert summary([seen] * 3, 0.95, 1) == summary([seen] * 3, 0.95, 1)
