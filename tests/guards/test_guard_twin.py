"""Guard twin: what its detector finds is gone exactly, what it misses is counted and bounded."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest
import torch
from torch import Tensor

from lcguard.agents.scenarios.schema import category_values
from lcguard.categories import CATEGORIES
from lcguard.evaluation.detection import asr_ceiling, hidden_tokens, measure, recall_lower
from lcguard.guards import FrozenGuard, KVShape
from lcguard.guards.detector import bridged, evenly_spaced, peaked, runs
from lcguard.guards.twin import TwinGuard
from lcguard.records import TokenRecord, mask_of, masks
from lcguard.rule import Rule
from lcguard.tokens import Special
from lcguard.training.dataset import guard_all, twin_contexts, with_policy
from lcguard.training.fit_detector import (
    choose_peak,
    choose_thresholds,
)
from lcguard.training.twins import found_twin, neutral_twin
from tests.fixtures import World, make_records
from tests.guards.fitted_twin import CONFIG, Fitted, fit_twin


@pytest.fixture(scope="module")
def fitted(world: World) -> Fitted:
    """A detector fitted on the tiny model, thresholds from the same records."""
    return fit_twin(world)


def test_every_value_of_its_records_is_found_and_gone(world: World, fitted: Fitted) -> None:
    module, records, _ = fitted
    guard = FrozenGuard(module)
    kv = world.source.prefill([r.ids for r in records])
    contexts = twin_contexts(guard, records, kv, world.special)
    for record, ids in zip(records, contexts, strict=True):
        assert len(ids) == len(record.ids)
        for span in record.spans:
            if span.secret:
                assert set(ids[span.start : span.end]) == {world.special.neutral_id}
    # the segment is a function of the contexts without them, to the bit
    sent = guard_all(guard, records, kv, world.source, world.special)
    assert torch.equal(sent.keys, world.source.prefill(contexts).keys)
    assert torch.equal(sent.values, world.source.prefill(contexts).values)


def test_what_the_policy_allows_stays(world: World, fitted: Fitted) -> None:
    module, records, _ = fitted
    guard = FrozenGuard(module)
    free = with_policy(records, ())
    kv = world.source.prefill([r.ids for r in records])
    assert twin_contexts(guard, free, kv, world.special) == [r.ids for r in records]
    one = with_policy(records, ("person",))
    for record, ids in zip(one, twin_contexts(guard, one, kv, world.special), strict=True):
        changed = {i for i, (a, b) in enumerate(zip(record.ids, ids, strict=True)) if a != b}
        exact = neutral_twin(record, ("person",), world.special.neutral_id)
        wanted = {i for i, (a, b) in enumerate(zip(record.ids, exact, strict=True)) if a != b}
        assert wanted <= changed


def test_saved_and_loaded_it_finds_the_same(world: World, fitted: Fitted, tmp_path: object) -> None:
    module, records, _ = fitted
    FrozenGuard(module).save_pretrained(f"{tmp_path}/guard")
    loaded = FrozenGuard.from_pretrained(f"{tmp_path}/guard", shape=world.source.shape)
    kv = world.source.prefill([r.ids for r in records[:4]])
    mask = masks(records[:4])
    first, second = module.marks(kv, mask), loaded.marks(kv, mask)
    assert second is not None
    assert torch.equal(first, second)
    assert int((first >= 0).sum()) > 0


def test_marks_do_not_depend_on_the_batch(world: World, fitted: Fitted) -> None:
    module, records, _ = fitted
    kv, mask = world.source.prefill([r.ids for r in records[:6]]), masks(records[:6])
    whole = module.marks(kv, mask)
    for i, record in enumerate(records[:6]):
        alone = module.marks(world.source.prefill([record.ids]), mask[[i]])
        assert torch.equal(alone[0], whole[i, : len(record.ids)])
    assert bool((whole[~kv.valid] == -1).all())


@pytest.mark.parametrize("touch_cost", [0.0, 0.5, 5.0])
def test_thresholds_cost_least(world: World, fitted: Fitted, touch_cost: float) -> None:
    module, _, read = fitted
    wide = replace(CONFIG, touch_cost=touch_cost, thresholds=(-99.0, 99.0))
    spans = [s for r in read.records for s in r.spans]
    n_values, n_tasks = (sum((s.category is None) == t for s in spans) for t in (False, True))
    logits: list[tuple[TokenRecord, Tensor]] = []
    for records, x, valid in read.batches(8):
        with torch.no_grad():
            logits += zip(records, module.detector(x, valid), strict=True)
    for c, limit in enumerate(choose_thresholds(module, [read], wide)):
        values, tasks = [], []
        for record, row in logits:
            for s in record.spans:
                part = row[s.start : s.end, c]
                if s.category == CATEGORIES[c]:
                    values.append(float(part.min()))
                elif s.category is None and CATEGORIES[c] in record.forbid:
                    tasks.append(float(part.max()))

        def cost(at: float, values: list[float] = values, tasks: list[float] = tasks) -> float:
            missed, touched = sum(v <= at for v in values), sum(t > at for t in tasks)
            return missed / n_values + touch_cost * touched / n_tasks

        if not values:
            assert limit == -99.0
            continue
        assert all(cost(limit) <= cost(v - 2e-3) + 1e-9 for v in values)
        if touch_cost == 0:
            assert all(v > limit for v in values)
            assert min(values) - limit < 0.01


@pytest.mark.parametrize("touch_cost", [0.0, 0.5, 50.0])
def test_the_peak_costs_least(world: World, fitted: Fitted, touch_cost: float) -> None:
    module, records, read = fitted
    config = replace(CONFIG, touch_cost=touch_cost, peaks=(0.0, 2.0, 6.0, 99.0))
    kv, costs = world.source.prefill([r.ids for r in records]), {}
    for peak in config.peaks:
        options = module.options() | {"peak": peak}
        other = TwinGuard.build(module.shape, len(CATEGORIES), options)
        other.load_state_dict(module.state_dict())
        marks = hidden_tokens(other, kv, records)
        assert marks is not None
        found = measure(records, marks)
        costs[peak] = 1 - found["recall"] + touch_cost * found["task_touched"]
    chosen = choose_peak(module, [read], config)
    assert costs[chosen] == pytest.approx(min(costs.values()))
    assert all(costs[peak] > costs[chosen] + 1e-9 for peak in config.peaks if peak < chosen)
    assert (chosen == 0.0) == (costs[0.0] <= min(costs.values()) + 1e-9)


def test_a_run_without_a_sure_token_is_no_value() -> None:
    marks = torch.tensor([[-1, 0, 0, -1, 2, 2, 1, -1, 3]])
    over = torch.tensor([[9.0, 0.5, 1.9, 9.0, 0.1, 2.1, 0.3, 9.0, 2.0]])
    assert peaked(marks, over, 2.0).tolist() == [[-1, -1, -1, -1, 2, 2, 1, -1, -1]]
    assert torch.equal(peaked(marks, over, 0.0), marks)


def test_placeholders(world: World) -> None:
    ids, marks = (1, 2, 3, 4, 5, 6), (-1, 0, 0, -1, 3, -1)
    special = replace(world.special, neutral_id=9)
    assert found_twin(ids, marks, "neutral", special) == (1, 9, 9, 4, 9, 6)
    assert found_twin(ids, marks, "fixed_length", special) == (1, 9, 9, 9, 9, 4, 9, 9, 9, 9, 6)
    typed = world.special.typed
    assert found_twin(ids, marks, "typed", special) == (1, *typed[0], 4, *typed[3], 6)
    assert world.tokenizer.decode(typed[0]).replace(" ", "") == "[PERSON]"
    with pytest.raises(ValueError, match="placeholder 'stars' is unknown: use neutral"):
        found_twin(ids, marks, "stars", special)


def test_surrogates_are_other_values_of_the_kind_one_for_each_value(world: World) -> None:
    person = CATEGORIES.index("person")
    special = Special.of(world.tokenizer, 0, [category_values(c) for c in CATEGORIES])
    ada = tuple(world.tokenizer(" Ada Long", add_special_tokens=False)["input_ids"])
    ids = (*ada, 5, *ada, 6, *ada[::-1])
    marks = [person] * len(ada) + [-1] + [person] * len(ada) + [-1] + [person] * len(ada)
    out = found_twin(ids, marks, "surrogate", special, b"k" * 32)
    first = special.surrogate(person, ada, b"k" * 32)
    assert first in special.values[person]
    assert out == (*first, 5, *first, 6, *special.surrogate(person, ada[::-1], b"k" * 32))
    assert ada not in (out[i : i + len(ada)] for i in range(len(out)))
    drawn = {special.surrogate(person, ada, bytes([k]) * 32) for k in range(1, 40)}
    assert len(drawn) > 15  # nobody without the key foresees it
    # never the value itself, even where it is one of those to draw from
    held = special.values[person][0]
    assert held not in {special.surrogate(person, held, bytes([k])) for k in range(1, 200)}
    with pytest.raises(ValueError, match="needs its segment's key"):
        found_twin(ids, marks, "surrogate", special)
    with pytest.raises(ValueError, match="no surrogates for person"):
        replace(special, values=()).surrogate(person, ada, b"k")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placeholder": "stars"}, "placeholder 'stars' is unknown: use neutral, fixed_length"),
        ({"layers": [7]}, "layers \\[7\\] are not all of 0..1"),
        ({"thresholds": [0.0]}, "1 thresholds for 7 categories"),
        ({"width": 33}, "width 33 must be a multiple of 32"),
    ],
)
def test_options_that_do_not_fit(world: World, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TwinGuard.build(KVShape(*world.source.shape), len(CATEGORIES), dict(options))


def test_holes_inside_a_value_are_closed_and_those_between_values_are_not() -> None:
    marks = torch.tensor([[0, -1, 0, -1, 2, -1, -1, 2, -1]])
    assert bridged(marks, 1).tolist() == [[0, 0, 0, -1, 2, -1, -1, 2, -1]]
    assert bridged(marks, 2).tolist() == [[0, 0, 0, -1, 2, 2, 2, 2, -1]]
    assert runs([0, 0, -1, 2, 3, 3]) == [(0, 2, 0), (3, 4, 2), (4, 6, 3)]


def test_layers_are_spread_over_the_model() -> None:
    assert evenly_spaced(30, 6) == (5, 10, 15, 19, 24, 29)
    assert evenly_spaced(2, 6) == (0, 1)
    assert evenly_spaced(4, 1) == (3,)


def test_the_bound_is_clopper_and_pearsons() -> None:
    found, total = 97, 100
    low = recall_lower(found, total)
    # at the bound, seeing so many or more has just the probability of the level's rest
    tail = sum(comb(total, k) * low**k * (1 - low) ** (total - k) for k in range(found, total + 1))
    assert tail == pytest.approx(0.05, abs=1e-9)
    assert recall_lower(0, 0) == recall_lower(0, 50) == 0.0
    assert recall_lower(50, 50) == pytest.approx(0.05 ** (1 / 50))
    assert asr_ceiling(50, 50, 0.1) == pytest.approx(1 - 0.9 * 0.05 ** (1 / 50))
    with pytest.raises(ValueError, match="found=3 of total=2"):
        recall_lower(3, 2)


def test_measure_counts_whole_values_and_touched_task_spans(world: World) -> None:
    records = make_records(world.encoder, 12, seed=5)

    marks = [torch.zeros(len(r.ids), dtype=torch.bool) for r in records]
    for record, row in zip(records, marks, strict=True):
        for s in record.spans:
            if s.secret:  # names but for their last token
                row[s.start : s.end - (s.category == "person")] = True
    found = measure(records, marks)
    secrets = [s for r in records for s in r.spans if s.secret]
    persons = sum(s.category == "person" for s in secrets)
    assert persons
    assert (found["found"], found["total"]) == (len(secrets) - persons, len(secrets))
    assert found["categories"]["person"]["found"] == 0
    assert found["task_touched"] == 0.0
    whole = measure(records, [torch.ones_like(row) for row in marks])
    assert (whole["recall"], whole["task_touched"], whole["tokens_flagged"]) == (1.0, 1.0, 1.0)


def test_a_mask_names_the_category_of_each_mark(world: World, fitted: Fitted) -> None:
    module, records, _ = fitted
    kv = world.source.prefill([r.ids for r in records[:8]])
    only = mask_of([Rule(("person",))] * 8)
    assert set(module.marks(kv, only).unique().tolist()) <= {-1, CATEGORIES.index("person")}
