"""What a training teaches: to leak nothing, where values stand, and words for bands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.gate import GateGuard
from lcguard.records import TokenRecord, masks
from lcguard.training import prepare, trainer
from lcguard.training.certificate import pair_leaks
from lcguard.training.config import PolicyMix, TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.shards import ALONE
from lcguard.training.steps import draw_batch
from lcguard.training.twins import ValuePool
from tests.fixtures import World
from tests.matrix import GUARDS
from tests.training.test_training import CONFIGS, train

# -- what it learns


def leak(world: World, module: GuardModule) -> float:
    """Nats per pair on records that nothing was fitted on."""
    module.eval()
    values = pair_leaks(module, world.others, ValuePool(world.others), world.source, seed=3)
    return sum(values) / len(values)


def leak_alone(**settings: Any) -> TrainConfig:
    """A gate that is trained on little but a leak."""
    return TrainConfig(
        "gate",
        {**GUARDS["gate"], "noise": 0.3},
        batch=8,
        questions=2,
        lr=1e-2,
        warmup=2,
        leak_ramp=1,
        gate_weight=0.0,
        kl_weight=0.1,
        ce_weight=0.0,
        policies=PolicyMix(all_rate=1.0, none_rate=0.0),
        **settings,
    )


def test_gate_training_removes_the_pair_leak(world: World, tmp_path: Path) -> None:
    """Held out, against an untrained gate and against noise of the same size alone."""
    config = leak_alone(steps=90, pair_weight=1.0)
    run = train(world, config, tmp_path)
    shape = KVShape(*world.source.shape)
    skipped = guard_class("gaussian").build(shape, len(CATEGORIES), {"noise": 0.3})
    skipped.fit_statistics(world.source.prefill([r.ids for r in world.records]))
    untrained = trainer.make_module(config, world.source)
    prepare.prepare(untrained, world.records, world.source, world.special, ValuePool(world.records))
    before, after, none = (leak(world, m) for m in (untrained, run.guard.module, skipped))
    assert after < 0.1 * before
    assert after < 0.1 * none
    assert before > 0.3 * none
    first, last = run.metrics[0]["pair_nats"], run.metrics[-1]["pair_nats"]
    assert last < 0.1 * first


def test_the_tail_is_the_mean_of_the_worst() -> None:
    leaks = torch.tensor([0.0, 8.0, 1.0, 3.0, 2.0], requires_grad=True)
    assert ALONE.worst_mean(leaks, 0.4) == 5.5
    assert ALONE.worst_mean(leaks, 0.6) == ALONE.worst_mean(leaks, 0.5) == (8.0 + 3.0 + 2.0) / 3
    assert ALONE.worst_mean(leaks, 1.0) == leaks.mean()
    assert ALONE.worst_mean(leaks, 0.01) == 8.0
    ALONE.worst_mean(leaks, 0.4).backward()
    assert leaks.grad is not None
    assert leaks.grad.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]  # the others are left alone


def test_training_on_the_tail_of_single_secrets(world: World, tmp_path: Path) -> None:
    """The term alone closes what single secrets leak, and of a path as of one hop."""
    config = leak_alone(steps=60, pair_weight=0.0, tail_weight=1.0)
    rows = train(world, config, tmp_path / "a").metrics
    assert "pair_nats" not in rows[0]
    assert rows[-1]["tail_nats"] < 0.2 * rows[0]["tail_nats"]
    path = replace(config, steps=1, path_hops=2)
    assert train(world, path, tmp_path / "b").metrics[0]["tail_nats"] > 1


def test_regress_training_nears_the_twin(world: World, tmp_path: Path) -> None:
    config = replace(
        CONFIGS["regress"],
        steps=25,
        batch=8,
        lr=5e-3,
        kl_weight=0.0,
        ce_weight=0.0,
        gate_weight=0.0,
        policies=PolicyMix(all_rate=1.0, none_rate=0.0),
    )
    errors = [row["twin_mse"] for row in train(world, config, tmp_path).metrics]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])


def test_labels_teach_each_gate_its_category(world: World, tmp_path: Path) -> None:
    """Held out: values of a category are withheld where it is forbidden, and little else."""
    config = TrainConfig(
        "gate",
        GUARDS["gate"],
        steps=80,
        label_steps=80,
        batch=12,
        lr=1e-2,
        warmup=2,
        checkpoint_every=80,
    )
    run = train(world, config, tmp_path)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    shares = {}
    for forbid in (("person",), tuple(c for c in CATEGORIES if c != "person")):
        records = with_policy(world.others, forbid)
        raw = world.source.prefill([r.ids for r in records])
        withheld = run.guard(raw, masks(records)).withheld
        for own in (True, False):
            at = [
                withheld[i, s.start : s.end]
                for i, r in enumerate(records)
                for s in r.spans
                if (s.category == "person") == own and s.category is not None
            ]
            shares[len(forbid) == 1, own] = float(torch.cat(at).mean())
    # before, the two are alike
    assert shares[True, True] > 2 * shares[True, False]
    assert shares[False, False] > 1.5 * shares[False, True]


def test_codebook_starts_at_placeholders(world: World) -> None:
    """Constants that the receiver reads as tokens, not as noise."""
    module = trainer.make_module(CONFIGS["gate"], world.source)
    assert isinstance(module, GateGuard)
    random_words = module.codebook.detach().clone()
    prepare.prepare(module, world.records, world.source, world.special, ValuePool(world.records))
    fill = world.source.prefill([(world.special.neutral_id,) * 4])
    torch.testing.assert_close(module.codebook[0], module.standardise(fill)[0, 3])
    assert not torch.allclose(module.codebook, random_words, atol=0.1)


def banded(records: Sequence[TokenRecord], pool: ValuePool, words: int) -> list[Any]:
    """(record, span, word) of every secret whose band has a word."""
    return [
        (i, s, w)
        for i, r in enumerate(records)
        for s in r.spans
        if s.category is not None and (w := pool.word(s, words)) is not None
    ]


def test_words_are_dealt_to_bands(world: World) -> None:
    pool = ValuePool(world.records)
    assert pool.bands
    assert {c for c, _ in pool.bands} <= set(DERIVABLE)
    words = {(s.category, s.band): w for _, s, w in banded(world.records, pool, 32)}
    assert sorted(words.values()) == [1 + pool.bands.index(b) for b in sorted(words)]
    assert {w for _, _, w in banded(world.records, pool, 2)} == {1}
    assert banded(world.records, pool, 1) == []


def test_words_of_bands_start_at_the_mean_of_their_values(world: World) -> None:
    pool = ValuePool(world.records)
    raw = world.source.prefill([r.ids for r in world.records])
    z = torch.randn(len(world.records), raw.keys.shape[3], 2, 2, 32)
    book = torch.zeros(40, 2, 2, 32)
    made = prepare.band_means(z, world.records, pool, book)
    found = banded(world.records, pool, 40)
    word = found[0][2]
    mine = [z[i, s.start : s.end] for i, s, w in found if w == word]
    torch.testing.assert_close(made[word], torch.cat(mine).mean(0))
    assert torch.equal(made[0], book[0])
    assert float(book.abs().max()) == 0  # the book given is not changed


def test_labels_teach_the_words_of_bands(world: World, tmp_path: Path) -> None:
    options = {**GUARDS["gate"], "words": 9}
    config = TrainConfig(
        "gate", options, steps=60, label_steps=60, batch=12, lr=1e-2, warmup=2, checkpoint_every=60
    )
    pool = ValuePool(world.records)
    raw = world.source.prefill([r.ids for r in world.records])

    def right(module: GuardModule) -> float:
        out = module.rewrite(module.standardise(raw), raw.valid, masks(world.records))
        assert out.words is not None
        said = out.words.argmax(-1)
        hits = [
            said[i, s.start : s.end, CATEGORIES.index(s.category)] == w
            for i, s, w in banded(world.records, pool, 9)
        ]
        return float(torch.cat(hits).float().mean())

    untrained = trainer.make_module(config, world.source)
    prepare.prepare(untrained, world.records, world.source, world.special, pool)
    assert right(train(world, config, tmp_path).guard.module) > max(0.6, 1.5 * right(untrained))


def test_batches_are_of_like_length_and_all_records_come(world: World) -> None:
    records = sorted(world.records, key=lambda r: len(r.ids)) * 8
    records = sorted(records, key=lambda r: len(r.ids))
    rng = random.Random(0)
    seen, spread = set(), []
    for _ in range(300):
        batch = draw_batch(rng, records, 4)
        assert len(batch) == 4
        lengths = [len(r.ids) for r in batch]
        spread.append(max(lengths) - min(lengths))
        seen |= {r.record_id for r in batch}
    assert seen == {r.record_id for r in records}
    whole = len(records[-1].ids) - len(records[0].ids)
    assert sum(spread) / len(spread) < whole / 3
    assert len(draw_batch(rng, records[:3], 8)) == 3
