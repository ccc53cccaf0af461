"""Guards one after the other: order, noise, withheld shares, options, refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.grid import noisy
from lcguard.guards.base import GuardModule, KVShape, guard_class
from lcguard.guards.compose import ComposeGuard, part_key
from lcguard.guards.erasure import ErasureGuard
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.noise import noise_key, segment_noise
from lcguard.protocols import KVBatch
from lcguard.training.fit_erasure import fit_erasure
from tests.fixtures import World, forbid_all, random_kv

SHAPE, C = KVShape(2, 2, 8), len(CATEGORIES)
KEYS = [noise_key(0, "a"), noise_key(0, "b")]


def part(name: str, **options: Any) -> dict[str, Any]:
    return {"guard": name, "options": options}


def compose(*parts: Any) -> ComposeGuard:
    return ComposeGuard.build(SHAPE, C, {"parts": list(parts)})


def module_of(name: str, **options: Any) -> GuardModule:
    """With parameters that do something."""
    module = guard_class(name).build(SHAPE, C, options)
    for p in module.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    module.fit_statistics(random_kv((30, 30), tuple(SHAPE), seed=3))
    return module


def kv() -> KVBatch:
    return random_kv((6, 6), tuple(SHAPE))


def test_parts_are_applied_in_order() -> None:
    a, b = module_of("residual", bottleneck=4), module_of("gate", width=32, blocks=1, noise=0.0)
    both = FrozenGuard(ComposeGuard.of([a, b]))(kv(), forbid_all(2)).kv
    step = FrozenGuard(b)(FrozenGuard(a)(kv(), forbid_all(2)).kv, forbid_all(2)).kv
    other = FrozenGuard(ComposeGuard.of([b, a]))(kv(), forbid_all(2)).kv
    torch.testing.assert_close(both.keys, step.keys)
    torch.testing.assert_close(both.values, step.values)
    assert not torch.allclose(both.keys, other.keys, atol=1e-3)
    plain = ComposeGuard.of([a, b])
    mean = plain.rewrite(plain.standardise(kv()), kv().valid, forbid_all(2)).mean
    torch.testing.assert_close(plain.restore(mean, kv()).keys, both.keys, atol=1e-5, rtol=1e-4)


def test_every_part_has_noise_of_its_own() -> None:
    """Two equal parts must not add the same noise twice, nor that of the segment's own key."""
    guard = FrozenGuard(compose(part("gaussian", noise=0.5), part("gaussian", noise=0.5)))
    found = guard.module.channels(guard(kv(), forbid_all(2), keys=KEYS).kv)
    streams = [[segment_noise(part_key(k, i), tuple(SHAPE), 6) for k in KEYS] for i in range(2)]
    first = noisy(guard.module.channels(kv()), 0.5, torch.stack(streams[0]))
    want = noisy(first, 0.5, torch.stack(streams[1]))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    keys = {part_key(k, i) for k in KEYS for i in range(3)} | set(KEYS)
    assert len(keys) == 8
    assert {len(k) for k in keys} == {hashlib.sha256().digest_size}
    draws = torch.Generator().manual_seed(0)
    out, _ = guard.module(kv(), forbid_all(2), draws)
    noise = (guard.module.channels(out) - guard.module.channels(kv())).flatten()
    assert float(noise.std()) == pytest.approx(0.5 * 2**0.5, rel=0.1)  # 1.0 if drawn once


def test_withheld_shares_combine() -> None:
    torch.manual_seed(0)
    gates = [module_of("gate", width=32, blocks=1, noise=0.0, start_bias=-1.0) for _ in range(2)]
    first = FrozenGuard(gates[0])(kv(), forbid_all(2))
    second = FrozenGuard(gates[1])(first.kv, forbid_all(2))
    both = FrozenGuard(ComposeGuard.of(gates))(kv(), forbid_all(2))
    want = 1 - (1 - first.withheld) * (1 - second.withheld)
    torch.testing.assert_close(both.withheld, want)
    assert bool((both.withheld > torch.maximum(first.withheld, second.withheld)).all())
    assert bool((both.withheld < 1).all())


def test_the_twin_is_sent_by_the_first_part_alone() -> None:
    guard = FrozenGuard(compose(part("redact"), part("gaussian", noise=0.1)))
    assert guard.needs_twin
    assert not FrozenGuard(compose(part("gaussian"))).needs_twin
    twin = random_kv((6, 6), tuple(SHAPE), seed=9)
    outs = [
        guard(random_kv((6, 6), tuple(SHAPE), seed=s), forbid_all(2), keys=KEYS, twin=twin).kv
        for s in (0, 1)
    ]
    assert torch.equal(outs[0].keys, outs[1].keys)
    assert float((outs[0].keys - twin.keys).std()) == pytest.approx(0.1, rel=0.2)
    with pytest.raises(GuardError, match="'compose' sends the twin's KV"):
        guard(kv(), forbid_all(2))
    with pytest.raises(ValueError, match=r"parts\[1\]: 'redact' sends the twin's KV and would"):
        compose(part("gaussian"), part("redact"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"parts \[\]: give a list of one guard or more"),
        ("gaussian", "parts 'gaussian': give a list"),
        (["gaussian"], r"parts\[0\]: 'gaussian' is no part; give \{guard: NAME"),
        ([{"options": {}}], "is no part"),
        ([{"guard": "gaussian", "colour": 1}], "is no part"),
        ([part("nothing")], "guard 'nothing' is unknown: use one of "),
        ([part("gaussian", colour=1)], r"parts\[0\]: guard 'gaussian' has no option 'colour'"),
        ([part("gaussian", noise=-1.0)], r"parts\[0\]: noise -1.0 must be a finite number"),
        ([part("compose", parts=[part("gaussian")])], "'compose' cannot be part of another"),
    ],
)
def test_what_cannot_be_composed_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComposeGuard.build(SHAPE, C, {"parts": parts})


def test_noise_belongs_to_the_parts() -> None:
    with pytest.raises(ValueError, match=r"noise 0.1: 'compose' has none; give it to a part"):
        ComposeGuard.build(SHAPE, C, {"parts": [part("gaussian")], "noise": 0.1})
    with pytest.raises(ValueError, match=r"parts \[\]"):
        ComposeGuard.of([])


def test_an_untrained_part_does_not_guard() -> None:
    """Evaluation fits statistics of what has no weights; a gate with random ones has them."""
    sample = random_kv((30, 30), tuple(SHAPE), seed=3)
    with pytest.raises(ValueError, match=r"parts\[1\]: 'gate' is not trained"):
        compose(part("gaussian"), part("gate", width=32, blocks=1)).fit_statistics(sample)
    trained = ComposeGuard.of([module_of("gaussian"), module_of("gate", width=32, blocks=1)])
    before = trained.chain()[1].center.clone()
    trained.fit_statistics(random_kv((9, 9), tuple(SHAPE), seed=8))
    assert torch.equal(trained.chain()[1].center, before)


def test_options_are_resolved_and_round_trip(tmp_path: Path) -> None:
    guard = FrozenGuard(compose(part("gaussian"), part("residual")))
    assert guard.card.options["parts"][0] == part("gaussian", noise=1.0)
    guard.save_pretrained(tmp_path / "guard")
    loaded = FrozenGuard.from_pretrained(tmp_path / "guard")
    assert loaded.card.options == guard.card.options == loaded.module.options()
    assert loaded.digest == guard.digest
    other = FrozenGuard(compose(part("residual"), part("gaussian")))
    assert other.digest != guard.digest


def test_erasure_then_noise_on_records(world: World) -> None:
    """As an evaluation would set it up: concepts, then statistics, and what each part leaves."""
    shape = KVShape(*world.source.shape)
    options = {"parts": [part("erasure"), part("gaussian", noise=0.3)]}
    module = ComposeGuard.build(shape, C, options)
    raw = world.source.prefill([r.ids for r in world.records])
    with pytest.raises(ValueError, match="'erasure' is not fitted"):
        FrozenGuard(module)(raw, forbid_all(len(raw)))
    fit_erasure(module, world.records, world.source)
    module.fit_statistics(raw)
    alone = ErasureGuard.build(shape, C, {})
    fit_erasure(alone, world.records, world.source)
    keys = [noise_key(0, r.record_id) for r in world.records]
    out = FrozenGuard(module)(raw, forbid_all(len(raw)), keys=keys)
    clean = FrozenGuard(alone)(raw, forbid_all(len(raw)))
    noise = (module.standardise(out.kv) - module.standardise(clean.kv))[raw.valid]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    torch.testing.assert_close(out.withheld, clean.withheld)
