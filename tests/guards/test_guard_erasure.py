"""The theorem of linear erasure, checked by scikit-learn; streaming; policies; records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import KVShape
from lcguard.guards.concepts import ConceptFitter
from lcguard.guards.erasure import ErasureGuard
from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.gaussian import GaussianGuard
from lcguard.protocols import KVBatch, Mask
from lcguard.records import mask_of
from lcguard.rule import Rule
from lcguard.training.dataset import with_policy
from lcguard.training.fit_erasure import concept_labels, fit_erasure, frequent_tokens
from tests.fixtures import World, forbid_all, random_kv

SHAPE = KVShape(2, 2, 8)
C = len(CATEGORIES)


def marked(seed: int = 0, n: int = 24, tokens: int = 40) -> tuple[KVBatch, Tensor]:
    """Correlated KV; the tokens of each category are pushed along a direction of their own."""
    kv = random_kv((tokens,) * n, tuple(SHAPE), seed)
    draw = torch.Generator().manual_seed(99)
    mix = torch.randn(8, 8, generator=draw)
    push = torch.randn(C + 1, 2, 2, 2, 1, 8, generator=draw)  # [C + 1, 2 (K|V), L, H, 1, D]
    push[C] = 0
    labels = torch.randint(-1, C, (n, tokens), generator=torch.Generator().manual_seed(seed))
    moved = push[labels, :, :, :, 0].permute(0, 2, 3, 4, 1, 5)  # [B, 2, L, H, T, D]
    return KVBatch(kv.keys @ mix + moved[:, 0], kv.values @ mix + moved[:, 1], kv.valid), labels


def fitted(values: int = 0) -> tuple[ErasureGuard, KVBatch, Tensor]:
    module = ErasureGuard.build(SHAPE, C, {"values": values})
    kv, labels = marked()
    module.fit_concepts(kv, labels * (1 + values) + (labels < 0) * values)
    return module, kv, labels


def mask(*names: str, n: int = 24) -> Mask:
    return mask_of([Rule.of(names)] * n)


def erased(module: ErasureGuard, kv: KVBatch, m: Mask) -> KVBatch:
    return FrozenGuard(module)(kv, m).kv


def accuracy(kv: KVBatch, wanted: Tensor) -> tuple[float, float]:
    """Of a logistic regression on the entries it was fitted on, and of the most frequent label."""
    x, y = kv.features()[kv.valid].numpy(), wanted[kv.valid].numpy()
    probe = LogisticRegression(max_iter=2000).fit(x, y)
    return float((probe.predict(x) == y).mean()), float(np.bincount(y).max() / len(y))


@pytest.mark.parametrize("name", ["person", "finance"])
def test_no_linear_probe_beats_chance_on_what_is_erased(name: str) -> None:
    module, kv, labels = fitted()
    wanted = (labels == CATEGORIES.index(name)).long()
    raw, chance = accuracy(kv, wanted)
    assert raw > chance + 0.05
    out = erased(module, kv, mask(name))
    after, _ = accuracy(out, wanted)
    assert after == pytest.approx(chance, abs=1e-9)  # it predicts the most frequent label
    # and what is allowed is read as well as before, but for what it shares with the erased
    allowed = (labels == CATEGORIES.index("health")).long()
    before, floor = accuracy(kv, allowed)
    assert accuracy(out, allowed)[0] > floor + 0.8 * (before - floor)


def test_covariance_with_every_forbidden_concept_is_gone() -> None:
    """Of a union of categories jointly, in all layers; with the others it stays."""
    module, kv, labels = fitted()
    forbidden = ("contact", "account", "health")
    x = erased(module, kv, mask(*forbidden)).features().flatten(0, 1).double()
    x, raw = x - x.mean(0), kv.features().flatten(0, 1).double()
    y = torch.nn.functional.one_hot(labels.flatten() + 1, C + 1)[:, 1:].double()
    after, before = (x.T @ (y - y.mean(0)) / len(y), (raw - raw.mean(0)).T @ y / len(y))
    gone = [CATEGORIES.index(c) for c in forbidden]
    stays = [i for i in range(C) if i not in gone]
    assert float(after[:, gone].abs().max()) < 1e-5 * float(before[:, gone].abs().max())
    assert float(after[:, stays].norm()) > 0.3 * float(before[:, stays].norm())


def test_unseen_records_of_the_same_kind() -> None:
    module, _, _ = fitted()
    kv, labels = marked(seed=5)
    wanted = (labels == 0).long()
    raw, chance = accuracy(kv, wanted)
    after, _ = accuracy(erased(module, kv, mask("person")), wanted)
    assert after - chance < 0.25 * (raw - chance)


def test_streaming_is_the_batch() -> None:
    kv, labels = marked()
    whole, parts = ConceptFitter(C), ConceptFitter(C)
    entries = ErasureGuard.build(SHAPE, C, {}).channels(kv).flatten(0, 1)
    whole.update(entries, labels.flatten())
    for first in range(0, len(entries), 77):
        parts.update(entries[first : first + 77], labels.flatten()[first : first + 77])
    for one, many in zip(whole.solve(), parts.solve(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-8)


def test_every_policy_has_its_own_eraser() -> None:
    """Records of a batch under different policies; one that forbids nothing is left alone."""
    module, kv, _ = fitted()
    policies = [(), ("person",), ("person", "health"), ()]
    m = mask_of([Rule.of(names) for names in policies])
    guarded = FrozenGuard(module)(kv[:4], m)
    for i, names in enumerate(policies):
        alone = erased(module, kv[i : i + 1], mask_of([Rule.of(names)]))
        torch.testing.assert_close(alone.keys[0], guarded.kv.keys[i])
        changed = not torch.allclose(alone.keys[0], kv.keys[i], atol=1e-3)
        assert changed == bool(names)
        # one dimension of 16 for every forbidden concept
        torch.testing.assert_close(guarded.withheld[i], torch.full((40,), len(names) / 16.0))
    nothing = erased(module, kv[:4], mask_of([Rule()] * 4))
    assert torch.equal(nothing.keys, kv.keys[:4])


def test_erasing_twice_changes_nothing_more() -> None:
    module, kv, _ = fitted()
    once = erased(module, kv, mask("person", "contact"))
    torch.testing.assert_close(
        erased(module, once, mask("person", "contact")).values, once.values, atol=1e-4, rtol=1e-4
    )


def test_what_was_never_fitted_is_refused() -> None:
    kv, labels = marked()
    module = ErasureGuard.build(SHAPE, C, {})
    with pytest.raises(ValueError, match="'erasure' is not fitted: call fit_concepts"):
        FrozenGuard(module)(kv, mask("person"))
    module.fit_concepts(kv, torch.where(labels == 0, -1, labels))
    with pytest.raises(ValueError, match="on no token of category 'person', which the policy for"):
        FrozenGuard(module)(kv, mask("person"))
    assert FrozenGuard(module)(kv, mask("health"))
    for wrong, message in (
        (labels + C, "are not all within -1 and 6"),
        (labels[:, :3], "labels for"),
    ):
        with pytest.raises((ValueError, IndexError)):
            module.fit_concepts(kv, wrong)
        with pytest.raises(ValueError, match=message):
            ConceptFitter(C).update(module.channels(kv).flatten(0, 1), wrong.flatten())
    with pytest.raises(ValueError, match="erasure needs labelled tokens"):
        module.fit_concepts(kv, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match="values -1 must be 0 or more"):
        ErasureGuard.build(SHAPE, C, {"values": -1})


def test_statistics_of_the_concepts_stay(tmp_path: Path) -> None:
    """Evaluation fits channel statistics of guards without training; also after loading."""
    module, kv, _ = fitted(values=2)
    FrozenGuard(module).save_pretrained(tmp_path / "guard")
    loaded = FrozenGuard.from_pretrained(tmp_path / "guard")
    loaded.module.fit_statistics(random_kv((5, 9), tuple(SHAPE)))
    m = forbid_all(24)
    assert torch.equal(loaded(kv, m).kv.keys, FrozenGuard(module)(kv, m).kv.keys)


# -- on records


def test_labels_are_the_categories_of_values(world: World) -> None:
    records = world.records[:20]
    tokens = frequent_tokens(records, 3)
    labels = concept_labels(records, tokens, 3)
    for i, r in enumerate(records):
        inside = {at: s for s in r.spans if s.category for at in range(s.start, s.end)}
        for at in range(labels.shape[1]):
            label = int(labels[i, at])
            assert (label >= 0) == (at in inside)
            if label >= 0:
                c = CATEGORIES.index(inside[at].category)  # type: ignore[arg-type]
                assert label // 4 == c
                assert tokens[c].get(r.ids[at], 0) == label % 4
    assert max(map(len, tokens)) == 3


@pytest.mark.parametrize("values", [0, 4])
def test_fitted_on_records(world: World, values: int) -> None:
    """Where values stand is readable linearly in raw KV, and no more behind the guard."""
    module = ErasureGuard.build(KVShape(*world.source.shape), C, {"values": values})
    fit_erasure(module, world.records, world.source, batch=37)
    records = with_policy(world.records, CATEGORIES)
    raw = world.source.prefill([r.ids for r in records])
    labels = concept_labels(records, frequent_tokens(records, 0), 0)
    wanted = (labels >= 0).long()  # in any value: all concepts together
    before, chance = accuracy(raw, wanted)
    out = FrozenGuard(module)(raw, forbid_all(len(records))).kv
    assert before > chance + 0.01
    assert accuracy(out, wanted)[0] == pytest.approx(chance, abs=2e-3)


def test_a_guard_without_eraser_has_nothing_to_fit(world: World) -> None:
    plain = GaussianGuard(KVShape(*world.source.shape), C)
    with pytest.raises(ValueError, match="'gaussian' has no eraser to fit"):
        fit_erasure(plain, world.records, world.source)
