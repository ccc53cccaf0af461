"""Options of a training that are off by default: each does what its file says."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.guards.gate import GateGuard
from lcguard.training import prepare, trainer
from lcguard.training.category_adversary import (
    NONE,
    CategoryAdversary,
    category_labels,
    reverse_gradient,
)
from lcguard.training.config import PolicyMix, TrainConfig
from lcguard.training.dataset import attack_data, with_policy
from lcguard.training.objective import pair_leak_nats
from lcguard.training.rare_categories import (
    category_shares,
    category_weights,
    record_weights,
    warmed,
)
from lcguard.training.secret_traces import displaced, outside, root, shaped_maps, trace_covariance
from lcguard.training.trainer import Run
from lcguard.training.twins import ValuePool
from lcguard.training.uncertain_teacher import softened, token_kl
from tests.fixtures import World
from tests.matrix import GUARDS
from tests.training.test_training import train

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch": 6,
    "questions": 2,
    "leak_ramp": 1,
    "warmup": 2,
}


def run(world: World, out: Path, **settings: Any) -> Run:
    wanted: dict[str, Any] = {"options": GUARDS["gate"], **SMALL, **settings}
    return train(world, TrainConfig("gate", **wanted), out)


# -- a teacher that is less certain


def test_the_teacher_is_softened_where_it_cannot_be_followed() -> None:
    teacher = torch.tensor([[8.0, 0.0, 0.0], [8.0, 0.0, 0.0]])
    student = torch.tensor([[8.1, 0.0, 0.0], [0.0, 8.0, 0.0]])
    near, far = token_kl(student, teacher).tolist()
    assert near < 0.01
    assert far > 7
    soft = softened(student, teacher, 0.5)
    torch.testing.assert_close(soft[0], teacher[0])  # what is followed is asked for as before
    torch.testing.assert_close(soft[1], teacher[1] / (far / 0.5))
    entropy = torch.distributions.Categorical(logits=soft).entropy()
    assert float(entropy[1]) > 0.95 * math.log(3) > float(entropy[0])


def test_the_distance_gives_no_gradient() -> None:
    student = torch.tensor([[0.0, 8.0, 0.0]], requires_grad=True)
    assert not softened(student, torch.tensor([[8.0, 0.0, 0.0]]), 0.5).requires_grad


# -- rare categories


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_budget_of_weights_is_conserved(world: World, strength: float) -> None:
    """Over the training secrets, of which each counts once."""
    shares = category_shares(world.records)
    weights = category_weights(shares, strength)
    counts = Counter(str(s.category) for r in world.records for s, _ in r.categorised())
    mean = sum(n * weights[name] for name, n in counts.items()) / counts.total()
    assert mean == pytest.approx(1.0)
    by_share = sorted(shares, key=lambda name: -shares[name])
    assert weights[by_share[0]] == pytest.approx(1 - strength)
    ranked = [weights[name] for name in by_share]
    assert ranked == sorted(ranked)
    assert category_weights({"a": 0.5, "b": 0.5}, strength) == {"a": 1.0, "b": 1.0}


def test_weights_grow_over_their_warm_up() -> None:
    assert [warmed(0.5, t, 8, 0.5) for t in (0, 2, 4, 7)] == [0.0, 0.25, 0.5, 0.5]
    assert warmed(0.5, 0, 8, 0.0) == 0.5


def test_a_record_weighs_as_its_forbidden_values(world: World) -> None:
    record = next(r for r in world.records if len({s.category for s in r.spans} - {None}) > 1)
    own = Counter(str(s.category) for s, _ in record.categorised())
    first, *_ = own
    weights = {name: 3.0 if name == first else 1.0 for name in CATEGORIES}
    all_of, one, none = (
        float(record_weights(with_policy([record], forbid), weights))
        for forbid in (CATEGORIES, (first,), ())
    )
    assert one == 3.0
    assert none == 1.0
    assert all_of == pytest.approx(1 + 2 * own[first] / own.total())


# -- traces of secrets


@pytest.fixture(scope="module")
def traces(world: World) -> tuple[GateGuard, torch.Tensor]:
    """An untrained gate with its statistics, and S."""
    module = trainer.make_module(TrainConfig("gate", GUARDS["gate"]), world.source)
    assert isinstance(module, GateGuard)
    pool = ValuePool(world.records)
    prepare.prepare(module, world.records, world.source, world.special, pool)
    return module, trace_covariance(module, world.records, pool, world.source, seed=0)


def test_displacements_have_the_covariance_of_traces(
    world: World, traces: tuple[GateGuard, torch.Tensor]
) -> None:
    """And lie outside forbidden values alone."""
    module, covariance = traces
    factor = root(covariance)
    torch.testing.assert_close(factor @ factor.mT, covariance, rtol=1e-3, atol=1e-5)
    records = with_policy(world.records[:40], CATEGORIES)
    kv = world.source.prefill([r.ids for r in records])
    z = module.standardise(kv)
    normal = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    d = displaced(z, factor, records, kv.valid, normal) - z
    free = outside(records, kv.valid)
    assert not bool(d[kv.valid & ~free].any())
    drawn = d[free]
    found = torch.einsum("nlkc,nlkd->lkcd", drawn, drawn) / len(drawn)
    assert float((found - covariance).norm() / covariance.norm()) < 0.15


def test_few_directions_are_the_largest(traces: tuple[GateGuard, torch.Tensor]) -> None:
    _, covariance = traces
    kept = root(covariance, 3)
    assert int(torch.linalg.matrix_rank(kept[-1, 0])) == 3  # the first layer reads no other token
    best = torch.linalg.eigvalsh(covariance)[..., -3:].sum(-1)
    torch.testing.assert_close(kept.square().sum((-1, -2)), best, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="trace_directions=9999 must be within 0 and"):
        root(covariance, 9999)


def test_shaped_noise_lies_along_the_traces(traces: tuple[GateGuard, torch.Tensor]) -> None:
    """The mean passes as it is, the noise has the covariance 1 + s S."""
    _, covariance = traces
    squeeze, expand = shaped_maps(covariance, 4.0)
    eye = torch.eye(covariance.shape[-1]).expand_as(covariance)
    torch.testing.assert_close(squeeze @ expand, eye, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(expand.mT @ expand, eye + 4 * covariance, rtol=1e-3, atol=1e-3)


def test_shaping_needs_full_maps(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a guard with full maps, such as gate"):
        run(world, tmp_path, options={**GUARDS["gate"], "maps": "per_head"}, trace_noise=1.0)


@torch.no_grad()
def test_the_penalty_hides_the_directions_that_it_covers(
    world: World, traces: tuple[GateGuard, torch.Tensor], tmp_path: Path
) -> None:
    """After training on the penalty alone the guard tells displacements along the directions of
    the penalty least, beside those that it left out."""
    _, covariance = traces
    with torch.enable_grad():
        done = run(
            world,
            tmp_path,
            options={**GUARDS["gate"], "start_bias": -30.0},  # no gate closes
            steps=60,
            lr=2e-2,
            pair_weight=0.0,
            ce_weight=0.0,
            kl_weight=0.0,
            gate_weight=0.0,
            trace_weight=1.0,
            trace_directions=4,
            policies=PolicyMix(all_rate=1.0, none_rate=0.0),
        )
    module = done.guard.module
    covered = root(covariance, 4)
    left = covariance - covered @ covered.mT
    left = root(left) * (covered.norm() / root(left).norm())  # as large
    records = with_policy(world.others[:30], CATEGORIES)
    kv = world.source.prefill([r.ids for r in records])
    z, data = module.standardise(kv), attack_data(records, kv, world.special)
    normal = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    mean = module.rewrite(z, kv.valid, data.mask).mean

    def told(factor: torch.Tensor) -> float:
        moved = displaced(z, factor, records, kv.valid, normal)
        other = module.rewrite(moved, kv.valid, data.mask).mean
        return float(pair_leak_nats(mean, other, kv.valid, 0.1).mean())

    assert 0 < told(covered) < 0.5 * told(left)


# -- masked twins


def test_the_receiver_learns_from_the_masked_twin(world: World, tmp_path: Path) -> None:
    """By its teacher alone the guard nears what the receiver says on the twin, and leaves what it
    says on raw KV."""
    settings: dict[str, Any] = {
        "steps": 50,
        "lr": 2e-2,
        "batch": 8,
        "pair_weight": 0.0,
        "ce_weight": 0.0,
        "kl_weight": 5.0,
        "gate_weight": 0.0,
        "policies": PolicyMix(all_rate=1.0, none_rate=0.0, derive_rate=0.0),
    }
    masked = run(world, tmp_path / "twin", **settings, teacher="twin").metrics
    first, last = (sum(r["task_nats"] for r in part) / 10 for part in (masked[:10], masked[-10:]))
    assert last < 0.8 * first


def test_the_twin_teaches_no_derived_answers(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot know them; the true answer still counts by the CE term."""
    settings: dict[str, Any] = {
        "steps": 1,
        "teacher": "twin",
        "pair_weight": 0.0,
        "gate_weight": 0.0,
        "questions": 1,
        "policies": PolicyMix(all_rate=1.0, none_rate=0.0, derive_rate=1.0),
    }
    only = [
        replace(r, questions=tuple(q for q in r.questions if q.kind == "derived"))
        for r in world.records
        if any(q.kind == "derived" and q.category in DERIVABLE for q in r.questions)
    ]
    apart = replace(world, records=only[:20])
    kl = run(apart, tmp_path / "kl", **settings, ce_weight=0.0, kl_weight=1.0)
    ce = run(apart, tmp_path / "ce", **settings, ce_weight=1.0, kl_weight=0.0)
    assert kl.metrics[0]["task_nats"] == 0.0
    assert ce.metrics[0]["task_nats"] > 0.0


def test_the_gradient_is_reversed_at_hidden_tokens_alone() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    y = reverse_gradient(x, torch.tensor([True, False]))
    assert torch.equal(y, x)
    (y * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]]


def test_a_guard_against_it_hides_categories(world: World) -> None:
    """A linear guard and the adversary, one step each at a time: at hidden tokens it names fewer
    categories than where the guard has nothing against it, and elsewhere as many."""
    records = with_policy(world.records[:60], CATEGORIES[:3])
    kv = world.source.prefill([r.ids for r in records])
    module = trainer.make_module(TrainConfig("gate", GUARDS["gate"]), world.source)
    module.fit_statistics(kv)
    z = module.standardise(kv)
    labels, hidden = category_labels(records, z.shape[1])
    assert bool((labels[hidden] != NONE).all())

    def named(against: float) -> float:
        torch.manual_seed(0)
        net = CategoryAdversary(z.shape[2:].numel(), 16)
        shift = torch.zeros(z.shape, requires_grad=True)
        optimizer = torch.optim.AdamW([*net.parameters(), shift], lr=0.02)
        for _ in range(60):
            sent = z + against * shift
            loss = net.loss(sent, kv.valid, records)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        guess = net.layers((z + against * shift).flatten(2)).argmax(-1)
        return float((guess[hidden] == labels[hidden]).float().mean())

    assert named(1.0) < 0.5 * named(0.0)


# -- all off


def test_nothing_of_it_is_on_by_default() -> None:
    config = TrainConfig()
    off = ("uncertain_nats", "rare_strength", "trace_weight", "trace_noise", "category_weight")
    assert not any(getattr(config, name) for name in off)
    assert (config.teacher, config.rollback_every, config.schedule) == ("raw", 0, ())
    for name, value in (("rare_strength", 2.0), ("uncertain_nats", -1.0), ("rollback_every", -1)):
        with pytest.raises(ValueError, match=f"{name}={value:g}"):
            TrainConfig(**{name: type(getattr(config, name))(value)})
