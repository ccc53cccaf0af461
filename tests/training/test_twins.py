"""Counterfactual contexts differ from the text in the forbidden values and nowhere else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lcguard.agents.scenarios.schema import RECORD_TYPES
from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.records import TokenRecord, TokenSpan
from lcguard.rule import Rule
from lcguard.training.dataset import with_policy
from lcguard.training.twins import (
    ValuePool,
    fixed_length_twin,
    forbidden_spans,
    neutral_twin,
    with_value,
)
from tests.fixtures import World

BANDS = {f.name: f.band for r in RECORD_TYPES for f in r.fields if f.band is not None}
POLICIES = [(), ("person",), ("finance", "health"), CATEGORIES]


def changed(record: TokenRecord, ids: tuple[int, ...]) -> set[int]:
    return {i for i, (a, b) in enumerate(zip(record.ids, ids, strict=True)) if a != b}


def inside(record: TokenRecord, forbid: tuple[str, ...]) -> set[int]:
    return {i for s in record.spans if s.category in forbid for i in range(s.start, s.end)}


@pytest.mark.parametrize("forbid", POLICIES)
def test_neutral_twin_covers_exactly_the_forbidden_spans(
    world: World, forbid: tuple[str, ...]
) -> None:
    neutral = 10_000  # a token that no record has
    hits = 0
    for record in world.records:
        twin = neutral_twin(record, forbid, neutral)
        assert changed(record, twin) == inside(record, forbid)
        assert {i for i, t in enumerate(twin) if t == neutral} == inside(record, forbid)
        hits += len(inside(record, forbid))
    assert (hits > 0) == bool(forbid)


@pytest.mark.parametrize("forbid", POLICIES)
def test_fixed_length_twin_hides_lengths(world: World, forbid: tuple[str, ...]) -> None:
    neutral = 10_000
    for record in world.records:
        twin = fixed_length_twin(record, forbid, neutral, 4)
        keep = [t for i, t in enumerate(record.ids) if i not in inside(record, forbid)]
        assert [t for t in twin if t != neutral] == keep
        n = len(forbidden_spans(record, forbid))
        assert len(twin) == len(keep) + 4 * n


def test_fixed_length_twin_is_the_same_for_long_and_short_secrets() -> None:
    def record(ids: tuple[int, ...], end: int) -> TokenRecord:
        spans = (
            TokenSpan(end + 1, end + 2, "b", "contact", None, True),  # not in order of position
            TokenSpan(1, end, "a", "person", None, True),
        )
        return TokenRecord("r", "s", "e", "t", "v", ids, spans, (), Rule(CATEGORIES))

    short = fixed_length_twin(record((1, 2, 3, 4, 5), 2), CATEGORIES, 0)
    long = fixed_length_twin(record((1, 6, 7, 8, 9, 6, 7, 3, 4, 5), 7), CATEGORIES, 0)
    assert short == long == (1, *[0] * 4, 3, *[0] * 4, 5)


@pytest.mark.parametrize("forbid", POLICIES)
def test_resampling_changes_the_forbidden_values_alone(
    world: World, forbid: tuple[str, ...]
) -> None:
    pool, rng = ValuePool(world.records), random.Random(0)
    values = moved = 0
    for record in world.others:  # values that the pool never saw
        pair = pool.resample(rng, record, forbid)
        assert len(pair) == len(record.ids)
        assert changed(record, pair) <= inside(record, forbid)
        for span in forbidden_spans(record, forbid):
            values += 1
            moved += bool(changed(record, pair) & set(range(span.start, span.end)))
    if forbid:
        assert values > 10
        assert moved > 0.8 * values  # an independent draw may be the same value
    else:
        assert values == 0


@pytest.mark.parametrize("forbid", POLICIES)
def test_one_forbidden_value_is_resampled_and_the_others_are_held(
    world: World, forbid: tuple[str, ...]
) -> None:
    pool, rng, moved = ValuePool(world.records), random.Random(0), set[str]()
    for record in world.others:
        spans = forbidden_spans(record, forbid)
        for _ in range(3):
            where = changed(record, pool.resample_one(rng, record, forbid))
            of = [s for s in spans if where & set(range(s.start, s.end))]
            assert where <= {i for s in of for i in range(s.start, s.end)}
            assert len({record.ids[s.start : s.end] for s in of}) <= 1
            moved |= {s.field for s in of}
    assert bool(moved) == bool(forbid)
    if forbid == CATEGORIES:
        assert len(moved) > 5  # each of them is drawn sometimes


def test_the_same_value_changes_wherever_it_stands() -> None:
    spans = (
        TokenSpan(1, 3, "name", "person", None, True),
        TokenSpan(4, 6, "repeat", "person", None, True),
        TokenSpan(6, 8, "case", "account", None, True),
    )
    record = TokenRecord(
        "r", "s", "e", "t", "v", (0, 5, 6, 1, 5, 6, 5, 6), spans, (), Rule(CATEGORIES)
    )
    assert with_value(record, spans[0], (8, 9)) == (0, 8, 9, 1, 8, 9, 5, 6)
    assert with_value(record, spans[2], (8, 9)) == (0, 5, 6, 1, 5, 6, 8, 9)


def test_resampling_is_seeded(world: World) -> None:
    pool = ValuePool(world.records)
    draws = [
        [pool.resample(random.Random(seed), r, CATEGORIES) for r in world.others]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("derive", [(), DERIVABLE])
def test_resampling_holds_the_band_when_asked(world: World, derive: tuple[str, ...]) -> None:
    """Decoded and judged by the schema's own band functions."""
    pool, rng = ValuePool(world.records), random.Random(0)
    held, total, new = 0, 0, 0
    for record in world.records + world.others:
        for _ in range(4):
            pair = pool.resample(rng, record, CATEGORIES, derive)
            for s in forbidden_spans(record, CATEGORIES):
                if s.field not in BANDS or s.band is None:
                    continue
                text = world.decode(pair[s.start : s.end]).strip()
                total += 1
                held += BANDS[s.field](text) == s.band
                new += pair[s.start : s.end] != record.ids[s.start : s.end]
    assert total > 100
    assert new > 0.3 * total
    if derive:
        assert held == total
    else:
        assert held < 0.9 * total  # the other setting would notice


def test_a_band_without_values_keeps_the_text(world: World) -> None:
    """Better no counterfactual than one that contradicts the band which the receiver is taught."""
    spans = [s for r in world.records for s in r.spans if s.category == "finance" and s.band]
    record = next(r for r in world.records if spans[0] in r.spans)
    strange = replace(record, spans=tuple(replace(s, band="unheard of") for s in record.spans))
    pool, rng = ValuePool(world.records), random.Random(0)
    for _ in range(20):
        pair = pool.resample(rng, strange, ("finance",), ("finance",))
        assert pair == record.ids
    assert any(pool.resample(rng, strange, ("finance",)) != record.ids for _ in range(20))


def test_rare_lengths_still_get_a_counterfactual(world: World) -> None:
    """From tokens of the category, never from another one."""
    contact = {
        t
        for r in world.records
        for s in r.spans
        if s.category == "contact"
        for t in r.ids[s.start : s.end]
    }
    ids = (*range(3), *range(600, 637), *range(3))
    span = TokenSpan(3, 40, "phone", "contact", None, True)
    odd = TokenRecord("r", "s", "e", "t", "v", ids, (span,), (), Rule(CATEGORIES))
    pair = ValuePool(world.records).resample(random.Random(0), odd, CATEGORIES)
    assert set(pair[3:40]) <= contact
    assert len(set(pair[3:40])) > 3
    assert pair[:3] == pair[40:] == ids[:3]


def test_a_category_without_values_is_refused(world: World) -> None:
    record = next(r for r in world.records if inside(r, ("person",)))
    without = [r for r in world.records if not inside(r, ("person",))]
    with pytest.raises(ValueError, match="no value of category 'person' to resample from"):
        ValuePool(without).resample(random.Random(0), record, CATEGORIES)
    assert ValuePool(without).resample(random.Random(0), record, ()) == record.ids


def test_a_policy_decides_what_is_secret(world: World) -> None:
    (record,) = with_policy([next(r for r in world.records if inside(r, ("person",)))], ("person",))
    assert {s.category for s in record.secrets()} == {"person"}
    assert with_policy([record], ())[0].secrets() == []
