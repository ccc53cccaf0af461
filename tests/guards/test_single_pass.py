"""Guards of one prefill: what they found is gone where it stood, and what is left is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.kveraser import KVEraserGuard
from lcguard.guards.single_pass import Found, SinglePassGuard
from lcguard.guards.trace_gate import TraceGateGuard
from lcguard.records import TokenRecord, masks, pack_questions
from lcguard.training.dataset import with_policy
from lcguard.training.fit_single_pass import (
    SinglePassConfig,
    both_prefills,
    fit_kveraser,
    fit_trace_gate,
    policies,
    read_traces,
    told,
)
from lcguard.training.uncertain_teacher import token_kl
from tests.fixtures import World, make_records
from tests.guards.fitted_twin import Fitted, fit_twin

KINDS = ("trace_gate", "kveraser")
FIT = SinglePassConfig(steps=60, batch=8, lr=4e-3, warmup=5)


@pytest.fixture(scope="module")
def fitted(world: World) -> Fitted:
    return fit_twin(world)


def built(world: World, fitted: Fitted, name: str, **options: Any) -> Any:
    small = {"width": 32, "blocks": 1, "rank": 6, "detector": fitted[0].options()}
    shape = KVShape(*world.source.shape)
    module = guard_class(name).build(shape, len(CATEGORIES), small | options)
    assert isinstance(module, SinglePassGuard)
    module.start_from(fitted[0])
    return module


@pytest.fixture(scope="module")
def gate(world: World, fitted: Fitted) -> TraceGateGuard:
    module: TraceGateGuard = built(world, fitted, "trace_gate")
    traces = read_traces(module, policies(fitted[1]), world.source, world.special.neutral_id)
    fit_trace_gate(module, traces, FIT)
    return module


def prefilled(world: World, records: list[TokenRecord]) -> Any:
    return world.source.prefill([r.ids for r in records])


def places(module: SinglePassGuard, kv: Any, records: list[TokenRecord]) -> Found:
    return module.found(module.standardise(kv), kv.valid, masks(records))


def by_token(x: Tensor) -> Tensor:
    """``[B, L, H, T, D]`` as ``[B, T, L, H, D]``."""
    return x.permute(0, 3, 1, 2, 4)


@pytest.mark.parametrize("name", KINDS)
def test_only_what_was_found_and_what_stands_behind_it_changes(
    world: World, fitted: Fitted, name: str
) -> None:
    module, records = built(world, fitted, name), fitted[1][:8]
    kv = prefilled(world, records)
    found = places(module, kv, records)
    out = FrozenGuard(module)(kv, masks(records)).kv
    assert bool(found.hidden.any(1).all())  # every record has something
    before = kv.valid & ~found.hidden & ~found.later
    assert bool(before.any())
    for a, b in ((kv.keys, out.keys), (kv.values, out.values)):
        assert torch.equal(by_token(a)[before], by_token(b)[before])
        assert not bool((by_token(a)[found.hidden] == by_token(b)[found.hidden]).all())
    free = with_policy(records, ())
    same = FrozenGuard(module)(kv, masks(free)).kv
    assert torch.equal(same.keys, kv.keys)
    assert torch.equal(same.values, kv.values)


@pytest.mark.parametrize("name", KINDS)
def test_where_a_value_stood_nothing_depends_on_it(world: World, fitted: Fitted, name: str) -> None:
    """Given everything else of the cache: the entries of what was found are not read."""
    module, records = built(world, fitted, name), fitted[1][:4]
    with torch.no_grad():
        for p in module.reader.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # says something
    kv = prefilled(world, records)
    z, found = module.standardise(kv), places(module, kv, records)
    other = torch.where(found.hidden[:, :, None, None, None], torch.randn_like(z), z)
    first, second = (module.replaced(x, kv.valid, found) for x in (z, other))
    assert torch.equal(first[found.hidden], second[found.hidden])
    assert not torch.equal(z[found.hidden], other[found.hidden])


def test_noise_lies_along_the_traces_behind_what_was_found(
    world: World, fitted: Fitted, gate: TraceGateGuard
) -> None:
    records = fitted[1][:6]
    kv, mask = prefilled(world, records), masks(records)
    found, guard = places(gate, kv, records), FrozenGuard(gate)
    draws = [guard(kv, mask, keys=[bytes([i]) * 32] * len(records)).kv for i in (1, 2)]
    a, b = (gate.standardise(x) for x in draws)
    apart = a - b
    assert not bool(apart[kv.valid & ~found.later].any())
    assert bool(apart[found.later].abs().sum((1, 2, 3)).bool().all())
    u = gate.directions[:, :, : gate.config.rank]
    inside = torch.einsum("nlkw,lkrw->nlkr", apart[found.later], u)
    back = torch.einsum("nlkr,lkrw->nlkw", inside, u)
    assert torch.allclose(back, apart[found.later], atol=1e-3)
    # as much as was asked for, in units of the traces' spread: two draws
    assert (inside / gate.spread).std() == pytest.approx(2**0.5 * gate.config.noise, rel=0.05)
    again = guard(kv, mask, keys=[bytes([1]) * 32] * len(records)).kv
    assert torch.equal(again.keys, draws[0].keys)


def test_the_first_tokens_are_spared(world: World, fitted: Fitted) -> None:
    module = built(world, fitted, "trace_gate", spare_tokens=400)
    records = fitted[1][:4]
    kv = prefilled(world, records)
    found, out = places(module, kv, records), FrozenGuard(module)(kv, masks(records)).kv
    kept = found.later
    assert torch.allclose(by_token(out.keys)[kept], by_token(kv.keys)[kept], atol=1e-4)


def test_further_directions_are_projected_out(world: World, fitted: Fitted) -> None:
    module = built(world, fitted, "trace_gate", projected=5, noise=0.0)
    traces = read_traces(module, policies(fitted[1]), world.source, world.special.neutral_id)
    fit_trace_gate(module, traces, FIT)
    records = fitted[1][:4]
    kv = prefilled(world, records)
    found, out = places(module, kv, records), FrozenGuard(module)(kv, masks(records)).kv
    v = module.directions[:, :, module.config.rank :]
    left = torch.einsum("btlkw,lkrw->btlkr", module.standardise(out), v)[found.later]
    raw = torch.einsum("btlkw,lkrw->btlkr", module.standardise(kv), v)[found.later]
    assert left.abs().max() < 1e-3 < raw.abs().max()


def test_the_gate_comes_nearer_to_the_twin(
    world: World, fitted: Fitted, gate: TraceGateGuard
) -> None:
    """On records that it was not fitted on, with the values told."""
    records = policies(make_records(world.encoder, 24, seed=9))
    raw, twin = both_prefills(records, world.source, world.special.neutral_id)
    found = told(records, raw.valid)
    z, other = gate.standardise(raw), gate.standardise(twin)
    with torch.no_grad():
        mean = gate.replaced(z, raw.valid, found)
    for at in found:
        assert (mean - other)[at].square().mean() < (z - other)[at].square().mean()


def test_the_receiver_answers_behind_kveraser_as_if_the_values_had_not_been_read(
    world: World, fitted: Fitted
) -> None:
    module: KVEraserGuard = built(world, fitted, "kveraser")
    neutral, source = world.special.neutral_id, world.source
    records = policies(fitted[1])
    module.start_at(read_traces(module, records[:8], source, neutral).constant)

    def distance() -> float:
        raw, twin = both_prefills(records, source, neutral)
        packed = pack_questions(records, pad_id=source.pad_id)
        z = module.standardise(raw)
        with torch.no_grad():
            sent = module.restore(module.replaced(z, raw.valid, told(records, raw.valid)), raw)
            pair = source.answer_logits(sent, packed), source.answer_logits(twin, packed)
            return float(token_kl(*pair).mean())

    before = distance()
    fit_kveraser(module, records, source, neutral, FIT)
    assert distance() < 0.8 * before


def test_they_claim_no_certificate_and_vouch_for_nothing(
    world: World, fitted: Fitted, gate: TraceGateGuard
) -> None:
    for module in (gate, built(world, fitted, "kveraser")):
        assert not module.finds_secrets
        assert module.marks(prefilled(world, fitted[1][:1]), masks(fitted[1][:1])) is None
        with pytest.raises(ValueError, match="it has no grid"):
            module.grid_mean(prefilled(world, fitted[1][:1]), masks(fitted[1][:1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trace_gate", {"rank": 0}, "rank 0 must be within 1 and the 32 channels"),
        ("trace_gate", {"rank": 30, "projected": 3}, "projected 3 must be within 0 and the 2"),
        ("trace_gate", {"spare_tokens": -1}, "spare_tokens -1 must be 0 or more"),
        ("trace_gate", {"width": 20}, "width 20 must be a multiple of 32"),
        ("kveraser", {"detector": {"layer": 1}}, "guard 'twin' has no option 'layer'"),
    ],
)
def test_bad_options_are_refused(
    world: World, fitted: Fitted, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(world, fitted, name, **options)


def test_bad_training_is_refused(world: World, fitted: Fitted, gate: TraceGateGuard) -> None:
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        SinglePassConfig(steps=0)
    free = [r for r in with_policy(fitted[1][:4], ())][1::2]
    with pytest.raises(ValueError, match="none of 0 records has a value to hide"):
        policies(free[:0])
    with pytest.raises(ValueError, match="none of 0 records has a question"):
        fit_kveraser(built(world, fitted, "kveraser"), [], world.source, 0, FIT)
