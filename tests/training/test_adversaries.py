"""Attackers in the loop of a training, and the policies and data that it draws."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.frozen import FrozenGuard, weights_digest
from lcguard.guards.gate import GateGuard
from lcguard.protocols import KVBatch
from lcguard.records import masks
from lcguard.training.adversary import Ensemble, FieldPrior
from lcguard.training.config import PolicyMix
from lcguard.training.dataset import attack_data, guard_all, with_policy
from lcguard.training.steps import permitted, sample_policy
from lcguard.training.twins import fixed_length_twin, neutral_twin
from tests.fixtures import World
from tests.matrix import GUARDS
from tests.training.test_training import adversary, make_adversary

# -- adversaries


def ensemble(world: World, **changes: Any) -> Ensemble:
    records = world.records[:40]
    pairs = attack_data(records, world.source.prefill([r.ids for r in records]), world.special)
    return Ensemble(adversary(**changes), make_adversary, pairs, seed=0)


def test_every_attacker_is_reset_in_turn(world: World) -> None:
    """Also where resets fall on steps that the lag leaves out."""
    team = ensemble(world, lag=2, reset_every=3)
    batch = team._pairs.subset(range(4))
    nets = [m.network for m in team.members]
    fresh: list[int] = []
    for step in range(13):
        learned = team.learn(batch, step)
        assert bool(learned) == (step % 2 == 0)
        now = [m.network for m in team.members]
        fresh += [i for i, (a, b) in enumerate(zip(nets, now, strict=True)) if a is not b]
        nets = now
    assert fresh == [1, 0, 1, 0]


def test_attackers_differ_and_learn(world: World) -> None:
    team = ensemble(world)
    first, second = (weights_digest(m.network) for m in team.members)
    assert first != second
    batch = team._pairs.subset(range(8))
    losses = [team.learn(batch, step)["attacker_nats"] for step in range(12)]
    assert losses[-1] < losses[0]


def test_guard_term_rewards_what_the_attackers_lose(world: World) -> None:
    team = ensemble(world, weight=0.5)
    batch = team._pairs.subset(range(6))
    loss = sum(m.loss(batch, auxiliary=False) for m in team.members) / 2
    torch.testing.assert_close(team.guard_term(batch), -0.5 * torch.as_tensor(loss))
    keys = batch.kv.keys.clone().requires_grad_()
    term = team.guard_term(batch.with_kv(KVBatch(keys, batch.kv.values, batch.kv.valid)))
    term.backward()
    assert keys.grad is not None
    assert float(keys.grad.abs().sum()) > 0


def test_prior_divergence_is_zero_at_the_prior(world: World) -> None:
    team = ensemble(world, objective="kl_prior")
    prior = FieldPrior(team._pairs, team.members[0].fields)
    torch.testing.assert_close(prior.table.sum(-1), torch.ones(prior.table.shape[:2]))
    fields, labels, logp = team.members[0].log_probs(team._pairs.subset(range(6)))
    at = torch.arange(labels.shape[1]).clamp_max(7)
    own = prior.table[fields[:, None], at[None]].log()
    assert float(prior.divergence(fields, labels, own)) == pytest.approx(0, abs=1e-4)
    assert float(prior.divergence(fields, labels, logp).detach()) > 0.1
    nothing = attack_data(with_policy(world.records[:3], ()), team._pairs.kv[:3], world.special)
    assert float(team.guard_term(nothing).detach()) == 0


# -- policies and data


def test_policies_are_drawn_as_configured() -> None:
    rng = random.Random(0)
    mix = PolicyMix(all_rate=0.4, none_rate=0.1, derive_rate=0.25)
    drawn = [sample_policy(rng, mix) for _ in range(4000)]
    everything = sum(set(f) == set(CATEGORIES) for f, _ in drawn) / 4000
    assert 0.36 < everything < 0.45
    assert 0.08 < sum(not f for f, _ in drawn) / 4000 < 0.13
    for forbid, derive in drawn:
        assert set(derive) <= set(forbid) & set(DERIVABLE)
    kept = [c in d for f, d in drawn for c in f if c in DERIVABLE]
    assert 0.22 < sum(kept) / len(kept) < 0.28


def test_a_forbidden_answer_is_never_asked_for(world: World) -> None:
    kinds = set()
    for forbid, derive in ((CATEGORIES, ()), (CATEGORIES, DERIVABLE), ((), ())):
        for r in with_policy(world.records, forbid, derive):
            for q in r.questions:
                hidden = q.category in r.forbid
                free = not hidden or (q.kind == "derived" and q.category in r.derive)
                assert permitted(r, q) == free
                kinds.add((hidden, q.kind, free))
    assert (True, "derived", True) in kinds
    assert (True, "derived", False) in kinds
    assert (True, "direct", False) in kinds
    assert (True, "direct", True) not in kinds


@pytest.mark.parametrize("fixed", [False, True])
def test_guard_all_redacts_with_the_right_twin(world: World, fixed: bool) -> None:
    records = world.others[:5]
    shape = KVShape(*world.source.shape)
    guard = FrozenGuard(guard_class("redact").build(shape, len(CATEGORIES), {}))
    raw = world.source.prefill([r.ids for r in records])
    out = guard_all(guard, records, raw, world.source, world.special, fixed_length=fixed, batch=2)
    make = fixed_length_twin if fixed else neutral_twin
    twins = [make(r, r.forbid, world.special.neutral_id) for r in records]
    assert torch.equal(out.keys, world.source.prefill(twins).keys)
    assert not torch.equal(out.keys, raw.keys)


def test_guard_all_is_the_guard_under_each_records_policy(world: World) -> None:
    records = [*with_policy(world.others[:3], ()), *with_policy(world.others[3:6], CATEGORIES)]
    options = {**GUARDS["gate"], "noise": 0.0}
    module = GateGuard.build(KVShape(*world.source.shape), len(CATEGORIES), options)
    with torch.no_grad():
        module.gate.weight.normal_()
    guard = FrozenGuard(module)
    raw = world.source.prefill([r.ids for r in records])
    parts = guard_all(guard, records, raw, world.source, world.special, batch=2)
    torch.testing.assert_close(parts.keys, guard(raw, masks(records)).kv.keys, atol=1e-5, rtol=1e-4)
    strict = guard_all(guard, with_policy(records, CATEGORIES), raw, world.source, world.special)
    assert not torch.allclose(parts.keys[:3], strict.keys[:3], atol=1e-3)
    torch.testing.assert_close(parts.keys[3:], strict.keys[3:], atol=1e-5, rtol=1e-4)
