"""Attacks recover what lies open, nothing from another record, and never peek."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard.attacks.base import BaseAttack, Knowledge, attack_class, names, register
from lcguard.attacks.decoder import DecoderAttack
from lcguard.attacks.probe import ProbeAttack
from lcguard.protocols import Attack, AttackData, Guess
from lcguard.records import IGNORE
from lcguard.training.dataset import blind, with_policy
from tests.attacks.attackers import FITTED, STEPPED, data_of, few
from tests.fixtures import World
from tests.matrix import ATTACKS


def equipped(world: World, name: str, options: dict[str, Any] | None = None) -> BaseAttack:
    """With the model, no guard; options of its row unless others are given."""
    attack = attack_class(name).build(ATTACKS[name] if options is None else options)
    attack.equip(Knowledge(world.source, world.decode))
    return attack


@pytest.fixture(scope="module", params=FITTED)
def fitted(
    request: pytest.FixtureRequest, world: World, pairs: AttackData
) -> tuple[str, BaseAttack]:
    """Fitted on raw KV."""
    return request.param, equipped(world, request.param).fit(pairs)


def accuracy(guesses: Sequence[Guess]) -> float:
    """Mean share of right tokens."""
    return sum(g.token_accuracy or 0.0 for g in guesses) / len(guesses)


def test_every_registered_attack_has_a_row() -> None:
    assert names() == sorted(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
class TestEveryAttack:
    def test_states_what_it_is(self, name: str) -> None:
        attack = attack_class(name).build(ATTACKS[name])
        assert isinstance(attack, Attack)
        assert attack.name == name
        assert attack.access in ("white-box", "grey-box", "black-box")
        assert all(isinstance(t, str) and len(t) > 5 for t in (attack.goal, attack.reference))

    def test_options_round_trip(self, name: str) -> None:
        attack = attack_class(name).build(ATTACKS[name])
        again = attack_class(name).build(attack.options())
        assert again.config == attack.config
        assert attack.config != attack_class(name).build().config

    def test_unknown_options_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"attack '{name}' has no option 'colour'; it has: "):
            attack_class(name).build({"colour": 1})

    def test_unfitted_attack_recovers_nothing(
        self, name: str, world: World, victims: AttackData
    ) -> None:
        attack = attack_class(name).build(ATTACKS[name])
        attack.equip(Knowledge(world.source, world.decode))
        with pytest.raises(ValueError, match="is not fitted; call fit first"):
            attack.recover(victims)


@pytest.mark.parametrize("name", STEPPED)
def test_nested_options_are_checked(name: str) -> None:
    attack = attack_class(name).build({"fit": {"steps": 7}})
    assert attack.config.fit == replace(attack_class(name).Config().fit, steps=7)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"has no option fit\.colour; fit has: steps"):
        attack_class(name).build({"fit": {"colour": 1}})


@pytest.mark.parametrize("name", FITTED)
def test_no_secrets_nothing_to_fit(world: World, name: str) -> None:
    allowed = data_of(world, with_policy(world.records[:20], ()))
    assert any(r.secrets() for r in world.records[:20])
    with pytest.raises(ValueError, match="no secret"):
        equipped(world, name, few(name)).fit(allowed)


# -- what they recover


def exact(guesses: Sequence[Guess], data: AttackData) -> float:
    """Share of secrets guessed whole."""
    truth = [s.ids for secrets in data.secrets for s in secrets]
    return sum(g.ids == ids for g, ids in zip(guesses, truth, strict=True)) / len(truth)


def test_open_segments_are_read_and_foreign_ones_are_not(
    world: World, fitted: tuple[str, BaseAttack], pairs: AttackData, victims: AttackData
) -> None:
    """Records that the attacker never saw; the floor is the same attack on others' segments."""
    name, attack = fitted
    guesses = attack.recover(victims)
    floor = equipped(world, name).fit(blind(pairs)).recover(blind(victims, 1))
    assert exact(guesses, victims) > 0.9
    assert exact(floor, victims) < 0.1  # blind guessing: 1 in 512
    assert accuracy(guesses) > accuracy(floor) + 0.5
    assert all(g.nll_nats is not None and g.nll_nats >= 0 for g in guesses + floor)
    assert sum(g.nll_nats or 0 for g in floor) / len(floor) > 3 * math.log(8) - 0.5


def test_probe_reads_prose(written: tuple[AttackData, AttackData]) -> None:
    pairs, victims = written
    probe = ProbeAttack.build(ATTACKS["probe"])
    assert accuracy(probe.fit(pairs).recover(victims)) > 0.8
    assert accuracy(probe.fit(blind(pairs)).recover(blind(victims))) < 0.4


def test_a_tied_probe_reads_tokens_that_it_was_never_shown(
    world: World, victims: AttackData
) -> None:
    """Of a few records; one with classes of its own knows only what it has seen."""
    some = data_of(world, world.records[:4])
    shown = {t for ids in some.context_ids for t in ids}
    true = [s.ids for secrets in victims.secrets for s in secrets]
    new = [any(t not in shown for t in ids) for ids in true]
    assert sum(new) > 20
    options = {"width": 96, "fit": {"steps": 20, "batch": 64}}
    tied = equipped(world, "probe", options | {"tied": True, "negatives": 50}).fit(some)
    assert exact(tied.recover(victims), victims) > 0.9
    own = equipped(world, "probe", options).fit(some).recover(victims)
    assert not any(g.ids == ids for g, ids, is_new in zip(own, true, new, strict=True) if is_new)
    floor = equipped(world, "probe", options | {"tied": True}).fit(blind(some))
    assert exact(floor.recover(blind(victims, 1)), victims) < 0.1
    with pytest.raises(ValueError, match="negatives=5 is for tied"):
        equipped(world, "probe", {"negatives": 5})


def test_guesses_never_depend_on_the_truth(
    fitted: tuple[str, BaseAttack], victims: AttackData
) -> None:
    """Other true values of the same length: the same guesses, scored differently."""
    _, attack = fitted
    lies = [
        [replace(s, ids=tuple((t + 7) % 600 for t in s.ids)) for s in secrets]
        for secrets in victims.secrets
    ]
    honest, fooled = attack.recover(victims), attack.recover(replace(victims, secrets=lies))
    assert [g.ids for g in honest] == [g.ids for g in fooled]
    assert accuracy(fooled) < 0.5 * accuracy(honest)
    assert sum(g.nll_nats or 0 for g in fooled) > sum(g.nll_nats or 0 for g in honest)


def test_guesses_do_not_depend_on_the_batch(
    fitted: tuple[str, BaseAttack], victims: AttackData
) -> None:
    _, attack = fitted
    alone = [g for i in range(5) for g in attack.recover(victims.subset([i]))]
    together = attack.recover(victims)[: len(alone)]
    assert [g.ids for g in alone] == [g.ids for g in together]
    assert [(g.record_id, g.field) for g in alone] == [(g.record_id, g.field) for g in together]


@pytest.mark.parametrize("name", FITTED)
def test_fitting_is_seeded(world: World, name: str, pairs: AttackData, victims: AttackData) -> None:
    def nll(seed: int) -> list[float | None]:
        attack = equipped(world, name, few(name)).fit(pairs, seed=seed)
        return [g.nll_nats for g in attack.recover(victims.subset(range(5)))]

    assert nll(0) == nll(0) != nll(1)


def test_a_moved_secret_is_a_wrong_guess_not_an_error(
    pairs: AttackData, victims: AttackData
) -> None:
    """A guard may shorten the segment; the probe then has nothing to read."""
    probe = ProbeAttack.build(few("probe")).fit(pairs)
    short = victims.kv
    short = type(short)(short.keys[..., :2, :], short.values[..., :2, :], short.valid[:, :2])
    guesses = probe.recover(victims.with_kv(short))
    assert {g.ids for g in guesses} == {()}
    assert accuracy(guesses) == 0


# -- blind data


@pytest.mark.parametrize("n", [2, 3, 31])
def test_blind_takes_every_segment_away(victims: AttackData, n: int) -> None:
    """No record keeps its own, whatever the shuffle; nothing else changes hands."""
    data = victims.subset(range(n))
    numbered = torch.arange(n).float()
    kv = data.kv
    marked = type(kv)(numbered[:, None, None, None, None].expand_as(kv.keys), kv.values, kv.valid)
    for seed in range(20):
        shuffled = blind(data.with_kv(marked), seed)
        got = shuffled.kv.keys[:, 0, 0, 0, 0]
        assert not (got == numbered).any()
        assert sorted(got.tolist()) == numbered.tolist()
        assert shuffled.secrets == data.secrets
        assert (shuffled.context_ids == IGNORE).all()


def test_one_record_has_no_other(victims: AttackData) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        blind(victims.subset([0]))


def test_blind_pairs_can_be_fitted(pairs: AttackData) -> None:
    """No token of the context is known there: the auxiliary loss is a mean over nothing."""
    attack = DecoderAttack.build(few("decoder")).fit(blind(pairs))
    assert all(bool(torch.isfinite(p).all()) for p in attack.network.parameters())
    assert torch.isfinite(attack.loss(blind(pairs).subset(range(8))))


def test_longer_and_shorter_segments_than_the_context(pairs: AttackData) -> None:
    """Guards that move tokens leave no target per position, or too few."""
    attack = DecoderAttack.build(few("decoder"))
    attack.start(pairs)
    batch = pairs.subset(range(8))
    for ids in (batch.context_ids[:, :6], torch.nn.functional.pad(batch.context_ids, (0, 9))):
        assert torch.isfinite(attack.loss(replace(batch, context_ids=ids)))
    assert ProbeAttack.build(few("probe")).fit(replace(pairs, context_ids=pairs.context_ids[:, :6]))


def test_subset_keeps_what_belongs_together(victims: AttackData) -> None:
    some = victims.subset([4, 2])
    assert some.record_ids == [victims.record_ids[4], victims.record_ids[2]]
    assert some.secrets == [victims.secrets[4], victims.secrets[2]]
    assert some.prompts == [victims.prompts[4], victims.prompts[2]]
    assert torch.equal(some.kv.keys, victims.kv.keys[[4, 2]])
    assert torch.equal(some.context_ids, victims.context_ids[[4, 2]])


# -- the registry


def test_attacks_without_metadata_are_refused() -> None:
    class Mute(BaseAttack):
        goal = "something"

    with pytest.raises(ValueError, match="must state its goal and reference"):
        register("mute")(Mute)
    Mute.reference = "somewhere"
    with pytest.raises(ValueError, match="attack name 'decoder' is taken by DecoderAttack"):
        register("decoder")(Mute)
    with pytest.raises(ValueError, match="attack 'mute' is unknown: use one of c"):
        attack_class("mute")
