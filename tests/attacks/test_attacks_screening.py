"""Quick and active attacks: linear probes, descent without backward passes, planted triggers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard.attacks.base import Knowledge
from lcguard.attacks.gradient_prediction import GradientPredictionAttack
from lcguard.attacks.linear import LinearAttack
from lcguard.attacks.probe import ProbeAttack
from lcguard.attacks.soft import embedding_table, soft_prefill
from lcguard.attacks.trigger import TriggerAttack
from lcguard.categories import CATEGORIES
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.protocols import AttackData, Guard, Guess
from lcguard.records import TokenRecord
from lcguard.training.dataset import attack_data, blind, guard_all
from tests.attacks.attackers import form
from tests.fixtures import World
from tests.matrix import ATTACKS


def data_of(
    world: World, records: Sequence[TokenRecord], guard: Guard | None = None, seed: int = 0
) -> AttackData:
    kv = world.source.prefill([r.ids for r in records])
    if guard is not None:
        kv = guard_all(guard, records, kv, world.source, world.special, seed=seed)
    return attack_data(records, kv, world.special)


def know(attack: Any, world: World, guard: Guard | None = None) -> Any:
    attack.equip(Knowledge(world.source, world.decode, guard))
    return attack


def exact(guesses: Sequence[Guess], data: AttackData) -> float:
    truth = [s.ids for row in data.secrets for s in row]
    return sum(g.ids == ids for g, ids in zip(guesses, truth, strict=True)) / len(truth)


def accuracy(guesses: Sequence[Guess]) -> float:
    return sum(g.token_accuracy or 0.0 for g in guesses) / len(guesses)


@pytest.fixture(scope="module")
def pairs(world: World) -> AttackData:
    return data_of(world, form(300, 0))


@pytest.fixture(scope="module")
def victims(world: World) -> AttackData:
    return data_of(world, form(80, 1))


def frozen(world: World, name: str, **options: Any) -> FrozenGuard:
    module = guard_class(name).build(KVShape(*world.source.shape), len(CATEGORIES), options)
    module.fit_statistics(world.source.prefill([r.ids for r in form(64, 7)]))
    return FrozenGuard(module)


# -- linear


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_linear_reads_open_segments(pairs: AttackData, victims: AttackData, solver: str) -> None:
    attack = LinearAttack.build({"solver": solver, "max_tokens": 600}).fit(pairs)
    guesses = attack.recover(victims)
    assert exact(guesses, victims) > 0.9
    floor = LinearAttack.build({"solver": solver, "max_tokens": 600}).fit(blind(pairs))
    assert exact(floor.recover(blind(victims, 1)), victims) < 0.1


def test_linear_knows_what_it_never_saw_as_unlikely(pairs: AttackData, victims: AttackData) -> None:
    """A token outside its classes has a finite cross-entropy, larger than any other."""
    attack = LinearAttack.build({"max_tokens": 600}).fit(pairs)
    strange = [[replace(s, ids=(5,) * len(s.ids)) for s in row] for row in victims.secrets]
    nll = [g.nll_nats for g in attack.recover(replace(victims, secrets=strange))]
    assert min(n or 0 for n in nll) > 3 * 10
    assert max(n or 0 for n in nll) < 3 * 20


def test_linear_without_its_library(pairs: AttackData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"'linear' needs scikit-learn: pip install lcguard\["):
        LinearAttack().fit(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "magic"}, "solver 'magic' is unknown; known: ridge, logistic"),
        ({"max_tokens": 3}, "max_tokens=3 must be 20 or more"),
        ({"alpha": 0.0}, "alpha=0.0 above 0"),
    ],
)
def test_linear_refuses_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttack.build(options)


# -- gradient prediction


def descent(world: World, guard: Guard | None = None, **options: Any) -> GradientPredictionAttack:
    attack = GradientPredictionAttack.build({**ATTACKS["gradient_prediction"], **options})
    return know(attack, world, guard)  # type: ignore[no-any-return]


def test_predicted_gradients_do_what_true_ones_do(
    world: World, pairs: AttackData, victims: AttackData
) -> None:
    predicted = descent(world).fit(pairs)
    true = descent(world, mode="true", fit_steps=0).fit(pairs)
    assert predicted.gradient_cosine(victims) > 0.5
    asr = exact(true.recover(victims), victims)
    assert asr > 0.9
    assert exact(predicted.recover(victims), victims) >= 0.8 * asr
    # it is the regression that does it: another map of the same size leads nowhere
    predicted.weights = torch.randn_like(predicted.weights)  # type: ignore[arg-type]
    assert abs(predicted.gradient_cosine(victims)) < 0.2
    assert exact(predicted.recover(victims), victims) < 0.1


def test_no_backward_pass(
    world: World, pairs: AttackData, victims: AttackData, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = victims.subset(range(4))
    predicted, true = descent(world).fit(pairs), descent(world, mode="true").fit(pairs)
    kv, embeds = some.kv.trim(), predicted._start(some.kv).clone().requires_grad_()
    r, g = predicted.predicted_gradient(embeds, kv, some.mask)
    assert r.grad_fn is None
    assert g.grad_fn is None
    wanted = predicted.recover(some)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    monkeypatch.setattr(torch.Tensor, "backward", fail)
    assert predicted.recover(some) == wanted
    with pytest.raises(RuntimeError, match="a backward pass"):
        true.recover(some)


def test_true_gradient_is_that_of_the_loss(world: World, victims: AttackData) -> None:
    """Against a difference quotient, through a guard with weights of its own."""
    guard = frozen(world, "gate", width=32, blocks=1, start_bias=-1.0)
    some = data_of(world, form(3, 1), guard)
    attack = descent(world, guard, mode="true", fit_steps=0).fit(some)
    kv = some.kv.trim()
    embeds = embedding_table(world.source)[some.context_ids] * 1.3
    r, g = attack.true_gradient(embeds, kv, some.mask)
    way = torch.randn(embeds.shape) * embeds.std()

    def loss(step: float) -> float:
        moved = attack.residual(embeds + step * way, kv, some.mask)
        return float(moved.double().square().sum()) / 2

    quotient = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert float((g * way).sum()) == pytest.approx(quotient, rel=0.02)
    assert float(r.abs().max()) > 0


def test_soft_tokens_on_the_table_are_tokens(world: World, victims: AttackData) -> None:
    table = embedding_table(world.source)
    kv = soft_prefill(world.source, table[victims.context_ids.clamp_min(0)], victims.kv.valid)
    torch.testing.assert_close(kv.keys, victims.kv.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kv.values, victims.kv.values, atol=1e-5, rtol=1e-4)


def test_the_first_layers_are_enough(world: World, pairs: AttackData, victims: AttackData) -> None:
    short = descent(world, layers=1).fit(pairs)
    assert exact(short.recover(victims), victims) > 0.9
    assert len(world.source.model.model.layers) == world.source.shape[0] == 2  # whole again
    with pytest.raises(ValueError, match=r"layers=3: the model has 2, so give 0 \(all\) to 2"):
        descent(world, layers=3).fit(pairs)
    with pytest.raises(ValueError, match="layers=1: a guard rewrites all layers, so give 0"):
        descent(world, frozen(world, "gaussian"), layers=1).fit(pairs)


def test_descent_through_a_guard(world: World) -> None:
    """Weak noise does not stop it; noise ten times the signal does."""
    found = []
    for noise in (0.1, 10.0):
        guard = frozen(world, "gaussian", noise=noise)
        own, theirs = data_of(world, form(64, 0), guard), data_of(world, form(40, 1), guard, 1)
        found.append(accuracy(descent(world, guard).fit(own).recover(theirs)))
    assert found[0] > 0.9
    assert found[1] < 0.3


def test_descent_refuses_what_it_cannot_use(world: World, pairs: AttackData) -> None:
    with pytest.raises(ValueError, match="mode 'magic' is unknown; known: predicted, true"):
        descent(world, mode="magic")
    with pytest.raises(ValueError, match="mode 'predicted' learns from 1 or more"):
        descent(world, fit_steps=0)
    with pytest.raises(ValueError, match="needs the agents' model: call equip"):
        GradientPredictionAttack().fit(pairs)

    class Closed:
        name, needs_twin = "closed", False

    with pytest.raises(ValueError, match="guard 'closed' has no module to look into"):
        know(descent(world), world, Closed()).fit(pairs)  # type: ignore[arg-type]


# -- the trigger

ROW = {**ATTACKS["trigger"], "length": 3, "candidates": 4, "records": 32}


@pytest.fixture(scope="module")
def weak(world: World) -> FrozenGuard:
    """A gate with random weights: what it lets through depends on whatever stands before."""
    torch.manual_seed(0)
    options = {"width": 32, "blocks": 1, "words": 1, "noise": 0.3, "start_bias": -1.0}
    module = guard_class("gate").build(KVShape(*world.source.shape), len(CATEGORIES), options)
    module.gate.weight.data.normal_(std=0.5)  # type: ignore[union-attr, operator]
    module.fit_statistics(world.source.prefill([r.ids for r in form(64, 7)]))
    return FrozenGuard(module)


def triggered(world: World, guard: Guard | None, pairs: AttackData, seed: int) -> TriggerAttack:
    return know(TriggerAttack.build(ROW), world, guard).fit(pairs, seed=seed)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def guarded(world: World, weak: FrozenGuard) -> tuple[AttackData, AttackData]:
    return data_of(world, form(300, 0), weak, 0), data_of(world, form(80, 1), weak, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_trigger_opens_a_weak_guard_for_records_it_never_saw(
    world: World, weak: FrozenGuard, guarded: tuple[AttackData, AttackData], seed: int
) -> None:
    own, theirs = guarded
    attack = triggered(world, weak, own, seed)
    reader = ProbeAttack(ProbeAttack.Config(ROW["width"], fit=attack.config.fit))
    without = accuracy(reader.fit(own, seed=seed).recover(theirs))
    assert len(attack.trigger_ids) == 3
    assert accuracy(attack.recover(theirs)) > without + 0.1
    assert attack.perplexity([attack.trigger_ids], own)[0] <= ROW["max_perplexity"]
    # and for records drawn with another seed
    other = data_of(world, form(80, 2), weak, 2)
    assert accuracy(attack.recover(other)) > accuracy(reader.recover(other)) + 0.1


def test_planted_data_is_what_the_sender_would_publish(
    world: World, weak: FrozenGuard, guarded: tuple[AttackData, AttackData]
) -> None:
    own, theirs = guarded
    attack = triggered(world, weak, own.subset(range(100)), 0)
    some = theirs.subset(range(6))
    planted = attack.plant(some)
    rows = attack.with_trigger([r.ids for r in form(6, 1)])
    assert [row[:3] for row in rows] == [list(attack.trigger_ids)] * 6
    assert planted.context_ids.tolist() == rows
    for row, secrets in zip(rows, planted.secrets, strict=True):
        assert all(tuple(row[slice(*s.positions)]) == s.ids for s in secrets)
    raw = world.source.prefill(rows)
    z = weak.module.standardise(raw)
    mean = weak.module.rewrite(z, raw.valid, some.mask).mean
    noise = weak.module.standardise(planted.kv) - mean  # what the guard adds and nothing else
    assert float(noise.std()) == pytest.approx(0.3, rel=0.1)
    assert float((mean - z).abs().mean()) > 0.1  # and it withholds something
    assert attack.plant(planted) is planted
    assert attack.recover(planted) == attack.recover(some)
    unknown = blind(some)
    assert attack.plant(unknown) is unknown


def test_the_message_stands_behind_the_chat_format(world: World) -> None:
    """Records of the scenario generator open with a special token."""
    attack = TriggerAttack.build({**ROW, "rounds": 0})
    know(attack, world).fit(data_of(world, world.records))
    attack.trigger_ids = (200, 201)
    (row,) = attack.with_trigger([world.records[0].ids])
    lead = next(i for i, t in enumerate(row) if t not in world.special.special_ids)
    assert lead > 0
    assert row[lead : lead + 2] == [200, 201]
    assert row[:lead] + row[lead + 2 :] == list(world.records[0].ids)


def test_candidates_keep_below_the_cap(
    world: World, weak: FrozenGuard, guarded: tuple[AttackData, AttackData]
) -> None:
    attack = know(TriggerAttack.build(ROW), world, weak)
    attack.fit(guarded[0].subset(range(60)))
    own = guarded[0].subset(range(20))
    start = attack._start(own)
    everything = attack.perplexity([(*start[:1], v, *start[2:]) for v in range(6, 200)], own)
    cap = sorted(everything)[50]
    attack.config = replace(attack.config, max_perplexity=cap, candidates=8)
    swaps = attack._swaps(own, start, 1)
    assert len(swaps) == 8
    assert max(attack.perplexity(swaps, own)) <= cap * 1.0001
    attack.config = replace(attack.config, max_perplexity=1.5)
    with pytest.raises(ValueError, match=r"max_perplexity=1.5 is below \d+, that of the model's"):
        attack.fit(guarded[0].subset(range(60)))


def test_nothing_opens_redaction(world: World) -> None:
    """The sender reads the trigger and publishes the twin: no gradient, no gain."""
    guard = frozen(world, "redact")
    own, theirs = data_of(world, form(120, 0), guard), data_of(world, form(60, 1), guard)
    attack = triggered(world, guard, own, 0)
    assert accuracy(attack.recover(theirs)) < 0.25  # blind: 1 in 8
