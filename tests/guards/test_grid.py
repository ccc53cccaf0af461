"""What leaves a noisy guard lies on a grid that no content moves; what an attacker makes of it."""

from __future__ import annotations

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.discrete_gaussian import STEPS
from lcguard.grid import LIMIT, log_likelihood, noisy, step_size, steps_per_unit, to_grid
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.noise import noise_key, segment_noise
from lcguard.protocols import KVBatch, Mask
from tests.fixtures import forbid_all, random_kv
from tests.guards.every_guard import module_of

SHAPE = (2, 2, 8)
KEYS = [noise_key(9, "a"), noise_key(9, "b")]
NOISY = {
    "gaussian": 0.7,
    "identity": 0.3,
    "gate": 0.21,
    "regress": 0.3,
    "residual": 0.2,
    "redact": 0.5,
}


def noisy_module(name: str) -> GuardModule:
    return module_of(name, noise=NOISY[name]).eval()


def sent(module: GuardModule, kv: KVBatch, mask: Mask) -> KVBatch:
    return FrozenGuard(module)(kv, mask, keys=KEYS[: len(kv)], twin=kv).kv


def test_means_go_to_the_nearest_point_and_ties_to_even() -> None:
    """0.25 is a power of two, so that half steps are exact."""
    half = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 5]) * 0.125 / STEPS
    assert to_grid(half, 0.25).tolist() == [-2, -1, 0, 0, 0, 1, 2, 2]
    far = torch.tensor([1e30, -1e30])
    assert to_grid(far, 0.25).tolist() == [LIMIT, -LIMIT]
    assert to_grid(torch.tensor([1.0]), 0.25).dtype is torch.int32


def test_far_points_and_near_ones_are_the_same_arithmetic() -> None:
    """Where float32 would no longer add exactly, integers do."""
    draws = torch.tensor([-9000, -1, 0, 1, 2, 8191], dtype=torch.int16)
    near = torch.linspace(-8.0, 8.0, 6)
    with_far = torch.cat((near, torch.tensor([2e5])))
    alone = noisy(near, 0.21, draws)
    together = noisy(with_far, 0.21, torch.cat((draws, draws[-1:])))
    assert torch.equal(alone, together[:6])
    k = to_grid(torch.tensor([2e5]), 0.21).item() + 8191
    assert together[6] == torch.tensor(float(k)) * step_size(0.21)
    points = (to_grid(near, 0.21) + draws).float() * step_size(0.21)
    assert torch.equal(alone, points)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_mean_that_is_not_finite_is_never_made_a_number(bad: float) -> None:
    """A grid point in its place would pass for output: a failed guard must be seen."""
    mean = torch.tensor([0.0, bad])
    assert noisy(mean, 0.3, torch.zeros(2, dtype=torch.int16)).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="not finite"):
        to_grid(mean, 0.3)
    kv = random_kv((3,))
    kv.keys[0, 0, 0, 1, 0] = bad
    with pytest.raises(GuardError, match="not finite; withheld"):
        sent(noisy_module("gaussian"), kv, forbid_all(1))


@pytest.mark.parametrize("name", NOISY)
def test_every_output_is_a_grid_point_of_the_mean_plus_the_draw(name: str) -> None:
    """All the content there is in an output is the integer ``grid_mean``; recovered by the
    attacker's own method, float32 KV gives the very integer that was drawn."""
    module, kv, mask = noisy_module(name), random_kv((6, 4)), forbid_all(2)
    points = module.grid_points(sent(module, kv, mask), mask)
    drawn = torch.stack([segment_noise(key, SHAPE, 6) for key in KEYS])
    wanted = module.grid_mean(kv, mask) + drawn
    live = kv.valid
    assert float((points - points.round()).abs()[live].max()) < 0.45
    assert torch.equal(points.round().long()[live], wanted.long()[live])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_sends_the_same_grid_points_rounded(dtype: torch.dtype) -> None:
    """Rounding a grid point is after the noise: it can tell nothing of the mean."""
    module, kv, mask = noisy_module("gate"), random_kv((6, 4)).to(dtype), forbid_all(2)
    exact, short = (sent(module, x, mask) for x in (kv.to(torch.float32), kv))
    assert short.keys.dtype is dtype
    assert torch.equal(short.keys, exact.keys.to(dtype))
    assert torch.equal(short.values, exact.values.to(dtype))


def test_contents_of_one_grid_mean_give_the_same_output_to_the_bit() -> None:
    """The last bits of a float, in which the old noise was read, do not reach the output."""
    module, mask = noisy_module("gaussian"), forbid_all(1)
    kv = random_kv((5,))
    near = KVBatch(kv.keys * (1 + 2.0**-22), kv.values * (1 - 2.0**-22), kv.valid)
    same = module.grid_mean(kv, mask) == module.grid_mean(near, mask)
    first, second = (module.channels(sent(module, x, mask)) for x in (kv, near))
    assert bool((module.channels(kv) != module.channels(near)).any())
    assert float(same.double().mean()) > 0.9
    assert torch.equal(first[same], second[same])
    apart = (first - second).abs()[~same] / step_size(NOISY["gaussian"])
    torch.testing.assert_close(apart, torch.ones_like(apart), atol=1e-2, rtol=0.0)


def test_the_likelihood_is_the_divergence_of_what_is_drawn() -> None:
    """On average over draws, truth beats another content by (k - k')^2 / 2 S^2 nats: exact for the
    discrete law."""
    module, mask = noisy_module("gaussian"), forbid_all(1)
    kv = random_kv((40,))
    other = KVBatch(kv.keys + 0.02, kv.values, kv.valid)
    k, wrong = module.grid_mean(kv, mask), module.grid_mean(other, mask)
    nats = float((k - wrong).double().square().sum()) / (2 * STEPS**2)
    gained = []
    for i in range(200):
        out = FrozenGuard(module)(kv, mask, keys=[noise_key(i, "draw")]).kv
        points = module.grid_points(out, mask).round()
        true, false = (log_likelihood(points, m, kv.valid) for m in (k, wrong))
        gained.append(float(true - false))
    mean = sum(gained) / len(gained)
    assert mean == pytest.approx(nats, abs=4 * (2 * nats / len(gained)) ** 0.5)


def test_padding_has_no_likelihood() -> None:
    points, means = torch.zeros(2, 3, 1, 2, 4), torch.ones(2, 3, 1, 2, 4)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    wanted = [-16 / (2 * STEPS**2), 0.0]
    assert log_likelihood(points, means, valid).tolist() == wanted


def test_a_policy_that_forbids_nothing_is_off_the_grid() -> None:
    module, kv = noisy_module("gate"), random_kv((4, 3))
    nothing = Mask(*torch.zeros(2, 2, len(CATEGORIES), dtype=torch.bool))
    torch.testing.assert_close(sent(module, kv, nothing).keys, kv.keys, atol=1e-5, rtol=1e-5)


def test_no_noise_no_grid() -> None:
    for module in (
        module_of("residual", noise=0.0),
        guard_class("compose").build(
            KVShape(*SHAPE), len(CATEGORIES), {"parts": [{"guard": "gaussian"}]}
        ),
    ):
        with pytest.raises(ValueError, match="adds no noise of its own"):
            module.grid_mean(random_kv((3,)), forbid_all(1))
        with pytest.raises(ValueError, match="adds no noise of its own"):
            module.grid_points(random_kv((3,)), forbid_all(1))


def test_noise_that_the_grid_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="noise 1e-05 is too fine"):
        module_of("gaussian", noise=1e-5)
    assert steps_per_unit(0.25) == 4096.0
