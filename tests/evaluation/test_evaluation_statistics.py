"""ASR, intervals and what they must never do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.evaluation.intervals import (
    cluster_bootstrap,
    upper_bound,
    wilson,
    zero_success_caveat,
)
from lcguard.evaluation.outcomes import Attempt, Outcome
from lcguard.evaluation.statistics import (
    any_of_k,
    asr,
    asr_by_category,
    best_attack,
    counts,
    mean_over_categories,
)

OUTCOMES = st.sampled_from(list(Outcome))


def attempt(outcome: str | Outcome, record: int = 0, **change: Any) -> Attempt:
    base: dict[str, Any] = {
        "scenario": "s",
        "edge": "a->b",
        "record": f"r{record}",
        "guard": "gate",
        "policy": "p",
        "attack": "probe",
        "seed": 0,
        "category": "salary",
        "field": "amount",
        "kind": "attack",
    }
    return Attempt(**(base | change), outcome=Outcome(outcome))


def many(success: int, resisted: int, **change: Any) -> list[Attempt]:
    made = ["success"] * success + ["resisted"] * resisted
    return [attempt(outcome, i, **change) for i, outcome in enumerate(made)]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)$conf.int
    [
        (5, 10, 0.2366, 0.7634),
        (0, 30, 0.0, 0.1135),
        (30, 30, 0.8865, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.5, 0.99))
def test_wilson_properties(successes: int, others: int, level: float) -> None:
    n = successes + others
    low, high = wilson(successes, n, level)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= successes / n <= high
    mirrored = wilson(others, n, level)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high))
    wider = wilson(successes, n, (1 + level) / 2)
    assert wider.low <= low
    assert wider.high >= high


@pytest.mark.parametrize(("successes", "n", "level"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 95)])
def test_wilson_refuses(successes: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="give"):
        wilson(successes, n, level)


def test_zero_successes_are_no_proof() -> None:
    assert upper_bound(0, 0) == 1
    assert round(upper_bound(0, 30), 2) == 0.11
    assert zero_success_caveat(0, 30) == "0 of 30 still allows 11.4%"
    assert zero_success_caveat(0, 0) == "nothing was scorable: no claim"
    assert zero_success_caveat(1, 30) is None


def test_asr_leaves_errors_out() -> None:
    attempts = [*many(1, 3), attempt("error", 8), attempt("not_applicable", 9)]
    assert asr(attempts) == 0.25
    assert counts(attempts) == {"success": 1, "resisted": 3, "error": 1, "not_applicable": 1}
    assert asr([attempt("error")]) is None
    assert asr([]) is None
    assert counts([]) == dict.fromkeys(("success", "resisted", "error", "not_applicable"), 0)


@given(st.lists(OUTCOMES, max_size=30), st.integers(0, 10))
def test_errors_are_never_counted_as_resisted(outcomes: list[Outcome], errors: int) -> None:
    attempts = [attempt(o, i) for i, o in enumerate(outcomes)]
    noisy = [*attempts, *(attempt("error", 100 + i) for i in range(errors))]
    assert asr(noisy) == asr(attempts)
    assert any_of_k(noisy) == any_of_k(attempts)
    assert counts(noisy)["resisted"] == counts(attempts)["resisted"]
    assert mean_over_categories(noisy, n_boot=20) == mean_over_categories(attempts, n_boot=20)


def test_bootstrap_is_repeatable_and_knows_its_clusters() -> None:
    values, clusters = [0.0, 1.0] * 40, [i // 2 for i in range(80)]
    once, twice = (cluster_bootstrap(values, clusters, seed=3) for _ in range(2))
    assert once == twice
    assert once.value == 0.5
    assert once.n_clusters == 40
    assert once.ci == pytest.approx((0.5, 0.5))  # each cluster has one of each: no doubt left
    alone = cluster_bootstrap(values, list(range(80)), seed=3)
    assert alone.ci is not None
    assert alone.ci[1] - alone.ci[0] > 0.15


def test_bootstrap_edge_cases() -> None:
    assert cluster_bootstrap([], []).value is None
    assert cluster_bootstrap([0.0, 1.0], ["d", "d"]).ci is None
    assert cluster_bootstrap([0.0] * 60, [i // 2 for i in range(60)]).ci == wilson(0, 30)
    assert cluster_bootstrap([1.0] * 30, range(30)).ci == wilson(30, 30)
    with pytest.raises(ValueError, match="NaN"):
        cluster_bootstrap([float("nan")], ["d"])
    with pytest.raises(ValueError, match="one cluster a value"):
        cluster_bootstrap([1.0, 0.0], ["d"])
    with pytest.raises(ValueError, match="n_boot"):
        cluster_bootstrap([1.0, 0.0], ["d", "e"], n_boot=0)


def test_bootstrap_blocks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50) % 3 / 2
    whole = cluster_bootstrap(values, range(50), n_boot=500)
    monkeypatch.setattr("lcguard.evaluation.intervals._BLOCK", 500)
    assert cluster_bootstrap(values, range(50), n_boot=500) == whole


def test_bootstrap_covers_the_truth() -> None:
    """Correlated within documents: the clustered interval holds its level, the naive one fails."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 6)
    hits = naive = 0
    for trial in range(150):
        rate = rng.beta(1.2, 2.8, 60)  # mean 0.3
        values = (rng.random(360) < rate[clusters]).astype(float)
        for labels in (clusters, np.arange(360)):
            ci = cluster_bootstrap(values, labels.tolist(), seed=trial, n_boot=200).ci
            assert ci is not None
            if labels is clusters:
                hits += ci[0] <= 0.3 <= ci[1]
            else:
                naive += ci[0] <= 0.3 <= ci[1]
    assert hits >= 132  # 95% of 150, less four standard errors
    assert naive < hits - 10


def test_mean_over_categories_weighs_categories_alike() -> None:
    attempts = many(9, 1, category="easy") + many(0, 100, category="hard")
    found = mean_over_categories(attempts)
    assert found.value == pytest.approx(0.45)
    assert found.ci is not None
    assert found.ci[0] < 0.45 < found.ci[1]
    assert found.n == 110
    assert found.n_clusters == 100
    empty = mean_over_categories([*attempts, attempt("error", category="unknown")])
    assert empty.value == pytest.approx(0.45)
    assert mean_over_categories([attempt("error")]).value is None


def test_mean_over_categories_never_claims_certainty() -> None:
    assert mean_over_categories(many(0, 30)).ci == wilson(0, 30)
    assert mean_over_categories(many(1, 1, scenario="s"), cluster_by="scenario").ci is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(OUTCOMES, st.integers(0, 5), st.sampled_from("abc"), st.integers(0, 2)),
        min_size=1,
        max_size=40,
    )
)
def test_mean_over_categories_equals_a_loop(rows: list[tuple[Outcome, int, str, int]]) -> None:
    attempts = [attempt(o, r, category=c, seed=s) for o, r, c, s in rows]
    per = [asr([a for a in attempts if a.category == c]) for c in "abc"]
    present = [p for p in per if p is not None]
    found = mean_over_categories(attempts, n_boot=50)
    if not present:
        assert found.value is None
        return
    assert found.value == pytest.approx(sum(present) / len(present))
    if found.ci is not None:
        assert 0 <= found.ci[0] <= found.ci[1] <= 1
    by = asr_by_category(attempts, n_boot=50)
    assert [by[c]["asr"] for c in by] == [per["abc".index(c)] for c in by]


def test_asr_by_category_rows() -> None:
    rows = asr_by_category([*many(3, 7, category="a"), attempt("error", category="b")])
    assert rows["a"]["asr"] == 0.3
    assert rows["a"]["n"] == 10
    assert rows["a"]["wilson"] == pytest.approx(list(wilson(3, 10)))
    assert rows["b"] == {"asr": None, "wilson": None, "bootstrap": None, "n": 0}


def test_any_of_k_joins_attacks_and_seeds() -> None:
    attempts = [
        attempt("resisted", 0, attack="a"),
        attempt("success", 0, attack="b", seed=1),
        attempt("resisted", 1, attack="a"),
        attempt("error", 2, attack="a"),
    ]
    assert any_of_k(attempts) == 0.5
    assert any_of_k([attempt("error")]) is None


def test_best_attack_averages_seeds_then_takes_the_largest() -> None:
    weak = many(5, 5, attack="lucky", seed=0) + many(0, 10, attack="lucky", seed=1)
    strong = many(3, 7, attack="steady", seed=0) + many(4, 6, attack="steady", seed=1)
    best = best_attack([*weak, *strong, attempt("error", attack="broken")])
    assert best.name == "steady"
    assert best.value == pytest.approx(0.35)
    assert best.by_attack["lucky"].value == pytest.approx(0.25)
    assert best.by_attack["broken"].value is None
    assert best.ci is not None
    assert best.ci[0] <= 0.35 <= best.ci[1]
    assert best_attack([attempt("error")]).name is None
    assert best_attack([]).value is None


def test_seeds_of_unequal_size_weigh_alike() -> None:
    attempts = many(10, 0, seed=0) + many(0, 90, seed=1)
    assert best_attack(attempts).value == pytest.approx(0.5)


@pytest.mark.parametrize("function", [mean_over_categories, best_attack, any_of_k])
def test_mixtures_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="guards"):
        function([attempt("success"), attempt("success", guard="other")])
    with pytest.raises(ValueError, match="kinds"):
        function([attempt("success"), attempt("success", kind="floor")])
    function([attempt("success"), attempt("success", kind="injection")])


def test_unknown_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster_by"):
        mean_over_categories(many(1, 1), cluster_by="line")  # type: ignore[arg-type]
