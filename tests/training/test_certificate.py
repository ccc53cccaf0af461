"""The certificate bounds what it says it bounds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcguard.agents.scenarios.schema import sample_banded
from lcguard.categories import CATEGORIES
from lcguard.discrete_gaussian import STEPS
from lcguard.guards.base import GuardModule, KVShape, Rewrite, guard_class
from lcguard.guards.gate import GateGuard
from lcguard.guards.gaussian import GaussianGuard
from lcguard.protocols import Mask
from lcguard.records import TokenRecord, TokenSpan, masks
from lcguard.rule import Rule
from lcguard.training.certificate import (
    binary_kl,
    blind_guess,
    certify,
    pair_leaks,
    success_ceiling,
    upper_bound,
)
from lcguard.training.dataset import with_policy
from lcguard.training.known_values import SampledValues
from lcguard.training.objective import pair_leak_nats
from lcguard.training.secret_ceiling import GUESS
from lcguard.training.twins import ValuePool
from tests.fixtures import World

inner = st.floats(0.001, 0.999)
nats = st.floats(0.0, 30.0)


@given(inner, inner)
def test_binary_kl_is_a_divergence(p: float, q: float) -> None:
    assert binary_kl(p, q) >= -1e-15
    assert binary_kl(p, p) == 0
    assert binary_kl(p, q) == pytest.approx(binary_kl(1 - p, 1 - q))
    assert binary_kl(p, q) >= 2 * (p - q) ** 2 - 1e-12  # Pinsker


def test_binary_kl_at_the_edges() -> None:
    assert binary_kl(1.0, 0.25) == pytest.approx(math.log(4))
    assert binary_kl(0.0, 0.25) == pytest.approx(math.log(4 / 3))
    assert binary_kl(0.5, 0.0) == binary_kl(0.5, 1.0) == math.inf


@given(nats, inner)
def test_ceiling_solves_the_inequality(information: float, p0: float) -> None:
    p = success_ceiling(information, p0)
    assert p0 <= p <= 1
    if p < 1:
        assert binary_kl(p, p0) == pytest.approx(information, abs=1e-6)
    else:
        assert binary_kl(1.0, p0) <= information + 1e-6


@given(inner, inner)
def test_ceiling_inverts_the_divergence(a: float, b: float) -> None:
    p0, p = sorted((a, b))
    assert success_ceiling(binary_kl(p, p0), p0) == pytest.approx(p, abs=1e-5)


@given(nats, nats, inner, inner)
def test_ceiling_is_monotone(a: float, b: float, p: float, q: float) -> None:
    (low, high), (p, q) = sorted((a, b)), sorted((p, q))
    assert success_ceiling(low, p) <= success_ceiling(high, p) + 1e-9
    assert success_ceiling(low, p) <= success_ceiling(low, q) + 1e-6


def test_ceiling_knows_its_limits() -> None:
    assert success_ceiling(0.0, 0.09) == pytest.approx(0.09)
    assert success_ceiling(1e9, 0.09) == success_ceiling(math.inf, 0.09) == 1.0
    assert success_ceiling(5.0, 0.0) < 0.6  # a secret that cannot be guessed
    assert success_ceiling(0.0, 1.0) == 1.0
    for bad in ((-1.0, 0.5), (math.nan, 0.5), (1.0, math.nan), (1.0, 1.5)):
        with pytest.raises(ValueError, match="must be >= 0"):
            success_ceiling(*bad)


@pytest.mark.parametrize("n", [4, 12, 200])
def test_upper_bound_covers_the_mean(n: int) -> None:
    """4 values and 200 alike: the normal quantile would cover .90 at n = 4."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1500, n))
    covered = np.mean([upper_bound(row, 0.95) >= 3.0 for row in draws.tolist()])
    assert 0.935 <= covered <= 0.965


@pytest.mark.parametrize(
    ("level", "n", "quantile"),
    [
        (0.95, 2, 6.3138),
        (0.95, 11, 1.8125),
        (0.99, 6, 3.3649),
        (0.975, 31, 2.0423),
        (0.95, 401, 1.6487),
    ],
)
def test_upper_bound_uses_students_t(level: float, n: int, quantile: float) -> None:
    """Against the printed table."""
    x = np.random.default_rng(n).normal(size=n)
    wanted = x.mean() + quantile * x.std(ddof=1) / math.sqrt(n)
    assert upper_bound(x.tolist(), level) == pytest.approx(wanted, abs=2e-4)


def test_upper_bound_refuses_what_it_cannot_bound() -> None:
    assert upper_bound([1.0], 0.95) == math.inf
    with pytest.raises(ValueError, match="not finite"):
        upper_bound([1.0, math.nan, 2.0], 0.95)
    for level in (1.0, 0.3):
        with pytest.raises(ValueError, match="level="):
            upper_bound([1.0, 2.0], level)


def test_pair_leak_is_the_gaussian_divergence() -> None:
    """Against torch's KL of two normal distributions; padding does not count."""
    a, b = torch.randn(2, 2, 3, 2, 2, 4)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    leak = pair_leak_nats(a, b, valid, 0.4)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(a, 0.4), normal(b, 0.4))
    torch.testing.assert_close(leak, (kl.sum((2, 3, 4)) * valid).sum(1))
    assert pair_leak_nats(a, a, valid, 0.4).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="without noise the pair leak is infinite"):
        pair_leak_nats(a, b, valid, 0.0)


# -- of whole guards


def of(world: World, name: str, **options: object) -> GuardModule:
    module = guard_class(name).build(KVShape(*world.source.shape), len(CATEGORIES), options)
    module.fit_statistics(world.source.prefill([r.ids for r in world.records]))
    return module


def test_a_guard_that_only_adds_noise_leaks_the_whole_difference(world: World) -> None:
    """The analytic figure: ||z - z'||^2 / 2 sigma^2, every context prefilled by itself."""
    module = of(world, "gaussian", noise=0.3)
    found = certify(module, world.others, world.source, seed=7)
    assert found is not None
    rng, pool, total = random.Random(7), ValuePool(world.others), 0.0
    held_out = [r for r in world.others if r.secrets()]
    for record in held_out:
        pair = pool.resample(rng, record, CATEGORIES)
        first, second = (module.standardise(world.source.prefill([c])) for c in (record.ids, pair))
        total += float((first - second).square().sum() / (2 * 0.3**2))
    assert found.n_pairs == len(held_out)
    assert found.mean_nats == pytest.approx(total / len(held_out), rel=1e-3)
    assert found.mean_nats > 1000
    assert found.vacuous
    assert found.asr_ceiling == 1.0
    half = certify(of(world, "gaussian", noise=0.6), world.others, world.source, seed=7)
    assert half is not None
    assert half.mean_nats == pytest.approx(found.mean_nats / 4, rel=1e-3)


def test_the_certificate_is_of_the_grid_points_that_noise_is_drawn_on(world: World) -> None:
    """Integers, to the last of them: two contexts whose means differ in a float's last bits alone
    are the same to a receiver, and two that lie on either side of a tie a whole step apart."""
    module, records = of(world, "gate", width=32, blocks=1), world.others[:12]
    found = pair_leaks(module, records, ValuePool(records), world.source, seed=4)
    rng, pool, wanted = random.Random(4), ValuePool(records), []
    pairs = [pool.resample(rng, r, r.forbid, r.derive) for r in records]
    kv, mask = world.source.prefill([*(r.ids for r in records), *pairs]), masks(records)
    first, second = (module.grid_mean(half, mask).long() for half in (kv[:12], kv[12:]))
    for a, b, valid in zip(first, second, kv.valid, strict=False):
        wanted.append(int((a - b)[valid].square().sum()) / (2 * STEPS**2))
    assert found == pytest.approx(wanted, rel=1e-12)
    assert sum(found) > 1


def test_a_closed_gate_leaks_nothing(world: World) -> None:
    module = of(world, "gate", width=32, blocks=1).train()
    assert isinstance(module, GateGuard)
    with torch.no_grad():
        module.gate.bias.fill_(20.0)
    records = world.records + world.others
    found = certify(module, records, world.source)
    assert found is not None
    assert found.mean_nats == found.max_nats == found.upper_nats == 0.0
    assert found.raw_nats > 1000
    assert 0 < found.blind_guess < 0.9
    assert found.asr_ceiling == pytest.approx(found.blind_guess)
    assert not found.vacuous
    assert module.training  # as it was before


def test_where_values_are_known_it_leads_with_one_secret(world: World) -> None:
    """A closed gate and a guard that only adds noise: nothing but the guess, and everything."""
    closed, noisy = of(world, "gate", width=32, blocks=1), of(world, "gaussian", noise=0.3)
    assert isinstance(closed, GateGuard)
    with torch.no_grad():
        closed.gate.bias.fill_(20.0)
    known = SampledValues(sample_banded, world.encoder.ids, world.decode, draws=400)
    found = [
        certify(m, world.others, world.source, known=known, references=4) for m in (closed, noisy)
    ]
    assert all(f is not None and f.secrets is not None for f in found)
    best, worst = (f.secrets for f in found if f is not None and f.secrets is not None)
    for row in best["ceilings"]:
        assert row["ceiling"] == pytest.approx(row["guess"], abs=1e-6) or row["guess"] > 0.5
    assert best["pair_nats"]["max"] == 0.0
    assert best["listed"]["asr"] == pytest.approx(best["listed"]["chance"])
    assert all(row["upper"] == 1.0 for row in worst["ceilings"])
    assert worst["listed"]["asr"] > 0.99
    for f in found:
        assert f is not None
        assert f.secrets is not None
        (lead,) = [c for c in f.secrets["ceilings"] if c["least_guess"] == GUESS]
        assert (f.asr_ceiling, f.blind_guess) == (lead["upper"], lead["guess"])
        assert f.vacuous == (f.asr_ceiling >= 0.9)
        json.dumps(f.to_dict(), allow_nan=False)
    plain = certify(closed, world.others, world.source)
    assert plain is not None
    assert plain.secrets is None


def test_figures_are_in_order(world: World) -> None:
    module = of(world, "gate", width=32, blocks=1)
    found = certify(module, world.others, world.source, level=0.99)
    assert found is not None
    assert 0 < found.mean_nats < found.upper_nats
    assert 0 < found.median_nats <= found.p99_nats <= found.max_nats
    # a gate that starts at keep withholds a little of everything
    assert found.mean_nats < found.raw_nats * 1.5
    assert found == certify(module, world.others, world.source, level=0.99)
    assert found.to_dict()["mean_nats"] == found.mean_nats


def test_nothing_is_certified_without_noise_or_secrets(world: World) -> None:
    assert certify(of(world, "residual"), world.others, world.source) is None
    with pytest.raises(ValueError, match="nothing to certify"):
        certify(of(world, "gaussian"), with_policy(world.others, ()), world.source)


def test_a_broken_guard_is_not_certified(world: World) -> None:
    class Broken(GaussianGuard):
        def rewrite(self, z: torch.Tensor, valid: torch.Tensor, mask: Mask) -> Rewrite:
            return super().rewrite(z * math.nan, valid, mask)

    module = Broken.build(KVShape(*world.source.shape), len(CATEGORIES), {})
    with pytest.raises(ValueError, match="not finite"):
        certify(module, world.others, world.source)


def test_blind_guess_is_the_best_constant() -> None:
    def record(value: int, field: str = "phone") -> TokenRecord:
        span = TokenSpan(0, 1, field, "contact", None, True)
        return TokenRecord("r", "s", "e", "t", "v", (value,), (span,), (), Rule(CATEGORIES))

    values = [record(v) for v in [1] * 15 + [2] * 10 + list(range(3, 28))]
    assert blind_guess(values) == pytest.approx(15 / 50)
    rare = [record(9, "email")] * 19
    assert blind_guess(values + rare) == pytest.approx(15 / 50)
    assert blind_guess([*values, *rare, rare[0]]) == pytest.approx((15 / 50 + 1) / 2)
    # too few to know: no ceiling rather than a low one
    assert blind_guess(rare) == blind_guess([]) == 1.0
    assert blind_guess([replace(r, rule=Rule()) for r in values]) == 1.0
