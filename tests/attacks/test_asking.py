"""Attackers who have the receiver's model answer, fine-tuned or told by soft prompts: they read raw
KV, and find nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.attacks.base import BaseAttack, Knowledge, attack_class
from lcguard.evaluation.said import says
from lcguard.protocols import AttackData, Guess, KVBatch
from lcguard.training.dataset import attack_data, blind, with_policy
from tests.fixtures import make_records
from tests.matrix import ATTACKS


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return load_backend("nano")


def data(agent: HFBackend, n: int, seed: int) -> AttackData:
    records = make_records(agent.encoder, n, seed)
    return attack_data(records, agent.source.prefill([r.ids for r in records]), agent.special)


@pytest.fixture(scope="module")
def pairs(agent: HFBackend) -> AttackData:
    return data(agent, 40, 0)


@pytest.fixture(scope="module")
def victims(agent: HFBackend) -> AttackData:
    return data(agent, 24, 1)


def made(agent: HFBackend, name: str) -> BaseAttack:
    rate = {"tuned_receiver": 1e-3, "soft_prefix": 1e-4}[name]
    options = {**ATTACKS[name], "max_tokens": 30, "fit": {"steps": 12, "lr": rate}}
    attack = attack_class(name).build(options)
    attack.equip(Knowledge(agent.source, agent.decode))
    return attack


@pytest.fixture(scope="module", params=["tuned_receiver", "soft_prefix"])
def tuned(request: pytest.FixtureRequest, agent: HFBackend, pairs: AttackData) -> BaseAttack:
    return made(agent, request.param).fit(pairs)


def right(agent: HFBackend, guesses: list[Guess], victims: AttackData) -> float:
    truth = [s.ids for secrets in victims.secrets for s in secrets]
    hits = [
        says(agent.decode(g.ids), agent.decode(ids)) for g, ids in zip(guesses, truth, strict=True)
    ]
    return sum(hits) / len(hits)


def test_it_reads_raw_kv_and_not_other_segments(
    agent: HFBackend, tuned: BaseAttack, victims: AttackData
) -> None:
    assert right(agent, tuned.recover(victims), victims) > 0.9
    assert right(agent, tuned.recover(blind(victims, 1)), victims) < 0.2


def test_soft_prompts_are_solved_on_guarded_segments_too(
    agent: HFBackend, pairs: AttackData, victims: AttackData
) -> None:
    """Behind a fixed change of all channels the vocabulary is no help; own segments are."""

    def turned(kv: KVBatch) -> KVBatch:
        return KVBatch(-kv.keys.flip(-1), -kv.values.flip(-1), kv.valid)

    attack = made(agent, "soft_prefix")
    attack.reschedule(steps=0)
    hidden, seen = pairs.with_kv(turned(pairs.kv)), victims.with_kv(turned(victims.kv))
    assert right(agent, attack.fit(hidden).recover(seen), victims) > 0.5


def test_it_is_seeded_and_leaves_the_receiver_alone(
    agent: HFBackend, tuned: BaseAttack, pairs: AttackData, victims: AttackData
) -> None:
    some, plain = victims.subset(range(4)), agent.source.reader
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    first = [(g.ids, g.nll_nats) for g in tuned.recover(some)]
    assert [(g.ids, g.nll_nats) for g in made(agent, tuned.name).fit(pairs).recover(some)] == first
    assert agent.source.reader is plain
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def test_guesses_do_not_depend_on_the_batch(tuned: BaseAttack, victims: AttackData) -> None:
    alone = [g.ids for i in range(4) for g in tuned.recover(victims.subset([i]))]
    assert [g.ids for g in tuned.recover(victims.subset(range(4)))] == alone


def test_a_secret_that_nothing_asks_about_is_not_guessed(
    tuned: BaseAttack, victims: AttackData
) -> None:
    some = victims.subset([0])
    silent = replace(some, prompts=[[() for _ in some.prompts[0]]])
    assert {g.ids for g in tuned.recover(silent)} == {()}


@pytest.mark.parametrize("name", ["tuned_receiver", "soft_prefix"])
def test_without_secrets_or_questions_there_is_nothing_to_fit(
    agent: HFBackend, pairs: AttackData, name: str
) -> None:
    assert pairs.records is not None
    allowed = attack_data(with_policy(pairs.records, ()), pairs.kv, pairs.special)
    with pytest.raises(ValueError, match="no secret in the training pairs: nothing is forbidden"):
        made(agent, name).fit(allowed)
    silent = replace(pairs, prompts=[[() for _ in asked] for asked in pairs.prompts])
    with pytest.raises(ValueError, match="has a question to ask"):
        made(agent, name).fit(silent)
