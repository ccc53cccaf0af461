"""Attacks that compute rather than learn: they read all that is open and nothing that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.attacks.base import Knowledge
from lcguard.attacks.collision import CollisionAttack
from lcguard.attacks.inversion import InversionAttack, projections, vocabulary_rows
from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule, KVShape, Rewrite, guard_class
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData, KVBatch
from lcguard.records import TokenRecord, TokenSpan
from lcguard.rule import Rule
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.dataset import attack_data, blind, guard_all
from tests.fixtures import KINDS, VOCAB, make_records, tiny_model

SPECIAL = Special(1, 3, VOCAB)


def record(name: str, ids: Sequence[int]) -> TokenRecord:
    """Two secrets of three tokens, one in the middle and one at the end."""
    n = len(ids)
    spans = (
        TokenSpan(n // 2, n // 2 + 3, "pin", "account", None, True),
        TokenSpan(n - 3, n, "code", "account", None, True),
    )
    return TokenRecord(name, name, "a->b", "form", "v", tuple(ids), spans, (), Rule(CATEGORIES))


def texts(n: int, length: int, seed: int, vocab: int = VOCAB) -> list[TokenRecord]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, vocab, (n, length), generator=generator).tolist()
    return [record(f"{seed}-{i}", ids) for i, ids in enumerate(drawn)]


def data_of(
    source: ModelSource,
    records: Sequence[TokenRecord],
    guard: FrozenGuard | None = None,
    special: Special = SPECIAL,
    seed: int = 0,
) -> AttackData:
    kv = source.prefill([r.ids for r in records])
    if guard is not None:
        kv = guard_all(guard, records, kv, source, special, seed=seed)
    return attack_data(records, kv, special)


def share(read: Sequence[Sequence[int]], records: Sequence[TokenRecord]) -> float:
    """Of all tokens, those read right."""
    pairs = [
        (a, b) for r, x in zip(read, records, strict=True) for a, b in zip(r, x.ids, strict=False)
    ]
    return sum(a == b for a, b in pairs) / sum(len(r.ids) for r in records)


def flat(data: AttackData) -> AttackData:
    """Every entry the mean entry: nothing is left but lengths."""
    live = data.kv.valid[:, None, None, :, None]

    def level(x: torch.Tensor) -> torch.Tensor:
        mean = (x * live).sum((0, 3), keepdim=True) / live.sum((0, 3), keepdim=True)
        return mean * live

    return data.with_kv(KVBatch(level(data.kv.keys), level(data.kv.values), data.kv.valid))


def guard_of(name: str, source: ModelSource, weights: float = 0.05, **options: Any) -> FrozenGuard:
    """Statistics from raw segments, random weights where there are any."""
    module = guard_class(name).build(KVShape(*source.shape), len(CATEGORIES), options)
    module.fit_statistics(source.prefill([r.ids for r in texts(20, 20, 5)]))
    torch.manual_seed(3)
    for p in module.parameters():
        p.data += weights * torch.randn_like(p)
    return FrozenGuard(module)


class Shift(GuardModule):
    """Other mean and spread in each channel: hides nothing."""

    name = "shift"

    def rewrite(self, z: torch.Tensor, valid: torch.Tensor, mask: Any) -> Rewrite:
        ramp = torch.linspace(-4, 4, z.shape[-1])
        return Rewrite(z * ramp.exp() + 20 * ramp, torch.zeros(valid.shape))


def inversion(source: ModelSource, guard: FrozenGuard | None = None, **options: Any) -> Any:
    attack = InversionAttack.build(options)
    attack.equip(Knowledge(source, str, guard))
    return attack


def collision(source: ModelSource, guard: FrozenGuard | None = None, **options: Any) -> Any:
    attack = CollisionAttack.build({"calibration": 4, **options})
    attack.equip(Knowledge(source, str, guard))
    return attack


@pytest.fixture(scope="module")
def llama() -> ModelSource:
    return ModelSource(tiny_model("llama"))


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    return load_backend("nano")


@pytest.fixture(scope="module")
def prose(nano: HFBackend) -> tuple[list[TokenRecord], list[TokenRecord]]:
    """The attacker's own records and the victims'."""
    return make_records(nano.encoder, 40, 2), make_records(nano.encoder, 20, 3)


# -- inversion


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_reads_every_family(kind: str) -> None:
    source, victims = ModelSource(tiny_model(kind)), texts(10, 20, 1)
    attack = inversion(source).fit(data_of(source, texts(5, 20, 0)))
    data = data_of(source, victims)
    assert share(attack.read(data.kv), victims) >= 0.95
    assert all(g.token_accuracy == 1 for g in attack.recover(data))
    assert share(attack.read(flat(data).kv), victims) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_solve_is_the_hidden_state(kind: str) -> None:
    """Biases included, where the entries determine it: a key norm leaves the values alone."""
    more = {"attention_bias": True} if kind in ("llama", "qwen3", "granite") else {}
    source = ModelSource(tiny_model(kind, **more))
    for p in (p for n, p in source.model.named_parameters() if n.endswith("proj.bias")):
        p.data.normal_()
    rows = vocabulary_rows(source)
    matrix, index = projections(source, rows)
    attack = inversion(source).fit(data_of(source, texts(5, 20, 0)))
    assert len(matrix) == len(index) == (32 if kind == "qwen3" else 64)
    assert int(index.min()) == (32 if kind == "qwen3" else 0)
    table = attack._table
    some = slice(1, 200)  # token 0 is padding, without an embedding of its own
    torch.testing.assert_close(table.solve(table.kv[some]), rows.hidden[some], atol=2e-3, rtol=2e-3)


def test_inversion_reads_the_nano_agent(
    nano: HFBackend, prose: tuple[list[TokenRecord], list[TokenRecord]]
) -> None:
    own, victims = (data_of(nano.source, r, special=nano.special) for r in prose)
    attack = inversion(nano.source).fit(own)
    assert share(attack.read(victims.kv), prose[1]) >= 0.95
    guesses = attack.recover(victims)
    assert [(g.record_id, g.field) for g in guesses] == [
        (r.record_id, s.field) for r in prose[1] for s in r.secrets()
    ]
    truth = [s.ids for r in prose[1] for s in r.secrets()]
    assert [g.ids for g in guesses] == truth
    floor = inversion(nano.source).fit(blind(own)).recover(blind(victims))
    assert sum(g.ids == t for g, t in zip(floor, truth, strict=True)) < 0.1 * len(truth)
    assert share(attack.read(flat(victims).kv), prose[1]) < 0.2  # a frequent token everywhere
    deep = inversion(nano.source, layer=1).fit(own)
    assert 0.4 < share(deep.read(victims.kv), prose[1]) < 0.95


def test_a_shift_of_statistics_hides_nothing(llama: ModelSource) -> None:
    guard = FrozenGuard(Shift(KVShape(*llama.shape), len(CATEGORIES)))
    own, victims = texts(30, 20, 0), texts(10, 20, 1)
    pairs, data = data_of(llama, own, guard), data_of(llama, victims, guard)
    assert share(inversion(llama, guard).fit(pairs).read(data.kv), victims) >= 0.95
    assert share(inversion(llama).fit(pairs).read(data.kv), victims) < 0.5  # not knowing of it


@pytest.mark.parametrize("options", [{"layer": 2}, {"layer": -1}, {"shortlist": 0}])
def test_inversion_refuses_what_cannot_be(llama: ModelSource, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} "):
        inversion(llama, **options).fit(data_of(llama, texts(2, 8, 0)))


# -- collision


def walk(attack: Any, data: AttackData) -> list[tuple[int, ...]]:
    return [attack.read(data.kv[i : i + 1], data.mask[[i]]) for i in range(len(data))]


@pytest.mark.parametrize("layer", [-1, 0, None])
def test_collision_reads_every_layer(llama: ModelSource, layer: int | None) -> None:
    victims = texts(2, 12, 1)
    attack = collision(llama, layer=layer).fit(data_of(llama, texts(5, 20, 0)))
    assert attack.threshold > 0
    data = data_of(llama, victims)
    assert share(walk(attack, data), victims) >= 0.95
    assert all(g.token_accuracy == 1 for g in attack.recover(data))
    assert share(walk(attack, flat(data)), victims) < 0.1


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"llama"}))
def test_collision_reads_every_family(kind: str) -> None:
    source, victims = ModelSource(tiny_model(kind)), texts(1, 10, 1)
    attack = collision(source).fit(data_of(source, texts(4, 12, 0)))
    assert share(walk(attack, data_of(source, victims)), victims) >= 0.95


def test_collision_reads_the_nano_agent(
    nano: HFBackend, prose: tuple[list[TokenRecord], list[TokenRecord]]
) -> None:
    own, victims = (data_of(nano.source, r, special=nano.special) for r in prose)
    attack = collision(nano.source, max_records=1).fit(own)
    assert share(walk(attack, victims.subset([0])), prose[1][:1]) >= 0.95
    guesses = attack.recover(victims)
    assert {g.record_id for g in guesses} == {prose[1][0].record_id}  # the others: not attempted
    assert [g.ids for g in guesses] == [s.ids for s in prose[1][0].secrets()]


def test_collision_goes_through_the_guard_it_knows(llama: ModelSource) -> None:
    guard = guard_of("residual", llama, weights=0.5, bottleneck=8)
    victims = texts(2, 10, 1)
    pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, victims, guard, seed=1)
    assert share(walk(collision(llama, guard).fit(pairs), data), victims) >= 0.95
    assert share(walk(collision(llama).fit(pairs), data), victims) < 0.95


@pytest.mark.parametrize("block", [0, 3])
def test_a_cloak_is_no_obstacle_to_who_holds_the_key(llama: ModelSource, block: int) -> None:
    guard = guard_of("cloak", llama, key="5a" * 32, block=block)
    foreign = guard_of("cloak", llama, key="5b" * 32, block=block)
    victims = texts(1, 12, 1)
    pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, victims, guard)
    assert share(walk(collision(llama, guard).fit(pairs), data), victims) >= 0.95
    assert share(walk(collision(llama, foreign).fit(pairs), data), victims) < 0.2
    assert share(inversion(llama, guard).fit(pairs).read(data.kv), victims) < 0.2  # cannot use it


def test_noise_is_a_likelihood_test(llama: ModelSource) -> None:
    """As much noise as half the signal, over all layers; drowned in ten times the signal."""
    victims = texts(2, 10, 1)
    rates = []
    for noise in (0.5, 10.0):
        guard = guard_of("gaussian", llama, noise=noise)
        pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, victims, guard, seed=1)
        attack = collision(llama, guard, layer=None).fit(pairs)
        rates.append(share(walk(attack, data), victims))
    assert rates[0] >= 0.9
    assert rates[1] < 0.2


def test_finish_is_taken_back() -> None:
    """A gate that is open squeezes, adds noise and expands: likelihood is taken before."""
    source = ModelSource(tiny_model("llama"))
    guard = guard_of("gate", source, width=32, blocks=1, words=2, noise=0.05)
    victims = texts(1, 8, 1)
    pairs, data = data_of(source, texts(5, 12, 0), guard), data_of(source, victims, guard, seed=1)
    attack = collision(source, guard, layer=None, batch=128).fit(pairs)
    assert not attack._foresight.local
    assert share(walk(attack, data), victims) >= 0.85


def test_collision_behind_consumed_segments(llama: ModelSource) -> None:
    """Rows of unequal length; ignoring them fails."""
    victims = texts(2, 10, 1)
    on = llama.prefill([[5, 6, 7, 8], [9, 10]])
    kv = llama.prefill([r.ids for r in victims], on=on)
    data = attack_data(victims, kv, SPECIAL)
    data = replace(data, on=on)
    attack = collision(llama).fit(data_of(llama, texts(5, 20, 0)))
    assert all(g.token_accuracy == 1 for g in attack.recover(data))
    alone = attack.recover(replace(data, on=None))
    assert sum(g.token_accuracy or 0 for g in alone) / len(alone) < 0.7


def test_redacted_secrets_are_not_found(llama: ModelSource) -> None:
    guard = guard_of("redact", llama)
    pairs, data = data_of(llama, texts(5, 20, 0), guard), data_of(llama, texts(3, 12, 1), guard)
    for attack in (inversion(llama, guard), collision(llama, guard)):
        found = attack.fit(pairs).recover(data)
        assert len(found) == 6
        assert {g.ids for g in found} == {(SPECIAL.neutral_id,) * 3}


def test_what_is_not_attempted_is_not_scored(llama: ModelSource) -> None:
    data = data_of(llama, [*texts(1, 30, 1), *texts(3, 10, 2)])
    pairs = data_of(llama, texts(3, 12, 0))
    found = collision(llama, max_tokens=12, max_records=2).fit(pairs).recover(data)
    assert [g.record_id for g in found] == ["2-0", "2-0", "2-1", "2-1"]


def test_collision_without_known_contexts(llama: ModelSource) -> None:
    """A blind floor's pairs: the threshold comes from random contexts."""
    attack = collision(llama, max_records=2).fit(blind(data_of(llama, texts(5, 12, 0))))
    data = data_of(llama, texts(3, 10, 1))
    assert all(g.token_accuracy == 1 for g in attack.recover(data))
    assert not any(g.token_accuracy for g in attack.recover(blind(data)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer": 2}, "layer 2"), ({"batch": 0}, "batch 0"), ({"calibration": 0}, "calibration 0")],
)
def test_collision_refuses_what_cannot_be(
    llama: ModelSource, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collision(llama, **options).fit(data_of(llama, texts(2, 8, 0)))
