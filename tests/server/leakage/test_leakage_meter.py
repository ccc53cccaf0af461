"""When an edge closes, what opens it again, and that neither is forgotten over a restart."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lcguard.evaluation.intervals import wilson
from lcguard.server.leakage.meter import LeakageError, LeakageMeter

EDGE = ("acme", "intake", "billing")
INTERVAL_S = 60.0


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def result(recovered: int, n: int = 200, **more: Any) -> dict[str, Any]:
    """A screening as the worker gives it."""
    low, high = wilson(recovered, n)
    base = {
        "tenant": EDGE[0],
        "source": EDGE[1],
        "audience": EDGE[2],
        "n_secrets": n,
        "recovered": recovered,
        "asr": recovered / n,
        "asr_low": low,
        "asr_high": high,
        "floor": 0.0,
        "attack": "probe",
        "seconds": 1.5,
        "guard": "gate",
        "guard_digest": "g1",
        "policy_digest": "p1",
    }
    return base | more


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(tmp_path: Path, clock: Clock) -> LeakageMeter:
    return opened(tmp_path, clock)


def opened(folder: Path, clock: Clock) -> LeakageMeter:
    return LeakageMeter(folder / "leakage.json", 0.2, INTERVAL_S, clock)


def states(meter: LeakageMeter, *results: dict[str, Any]) -> list[str]:
    return [meter.record(r).new for r in results]


LEAK, UNSURE, CLEAN = result(100), result(40), result(2)


def test_open_until_screened(meter: LeakageMeter) -> None:
    assert meter.verdict(*EDGE) == "open"
    assert meter.snapshot() == []
    change = meter.record(CLEAN)
    assert (change.old, change.new) == ("open", "open")
    assert change.edge.asr == 0.01


def test_a_leak_closes_this_edge_alone(meter: LeakageMeter) -> None:
    meter.record(CLEAN | {"audience": "clinic"})
    change = meter.record(LEAK)
    assert (change.old, change.new) == ("open", "closed")
    assert meter.verdict(*EDGE) == "closed"
    assert meter.verdict("acme", "intake", "clinic") == "open"
    assert meter.verdict("other", "intake", "billing") == "open"
    assert "100 of 200" in change.edge.reason


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (result(41), "open"),  # 20.5 %, lower bound 15 %: as likely a guard below the threshold
        (result(3, 8), "open"),  # 38 % of hardly anything
        (result(8, 8), "closed"),  # few, but all of them: the lower bound is 68 %
        (result(56), "closed"),  # 28 %, lower bound above 22 %
        (result(120, floor=0.6), "open"),  # guessed as well without the segment
        (result(120, floor=0.1), "closed"),
    ],
)
def test_the_lower_bound_closes(meter: LeakageMeter, found: dict[str, Any], state: str) -> None:
    assert meter.record(found).new == state


def test_two_clean_screenings_in_a_row_open(meter: LeakageMeter) -> None:
    assert states(meter, LEAK, CLEAN, CLEAN) == ["closed", "closed", "open"]
    # neither a leak nor an unclear screening in between counts as in a row
    between = states(meter, LEAK, CLEAN, UNSURE, CLEAN, LEAK, CLEAN, CLEAN)
    assert between == ["closed"] * 6 + ["open"]


def test_no_evidence_is_not_clean(meter: LeakageMeter) -> None:
    """None of five recovered still allows every second one."""
    few = result(0, 5)
    assert states(meter, LEAK, few, few, few) == ["closed"] * 4


@pytest.mark.parametrize("changed", [{"guard_digest": "g2"}, {"policy_digest": "p2"}])
def test_one_clean_screening_opens_under_another_guard_or_policy(
    meter: LeakageMeter, changed: dict[str, str]
) -> None:
    assert states(meter, LEAK, CLEAN | changed) == ["closed", "open"]


def test_another_guard_that_leaks_needs_two_as_well(meter: LeakageMeter) -> None:
    other = {"guard_digest": "g2"}
    found = states(meter, LEAK, LEAK | other, CLEAN | other, CLEAN | other)
    assert found == ["closed", "closed", "closed", "open"]


def test_an_operator_opens_and_the_next_leak_closes(meter: LeakageMeter) -> None:
    meter.record(LEAK)
    change = meter.reopen(EDGE, "root")
    assert (change.old, change.new) == ("closed", "open")
    assert "root" in change.edge.reason
    assert meter.verdict(*EDGE) == "open"
    assert meter.record(LEAK).new == "closed"
    with pytest.raises(KeyError):
        meter.reopen(("acme", "nobody", "billing"), "root")


def test_errors_change_no_state(meter: LeakageMeter) -> None:
    meter.record(LEAK)
    change = meter.record_error(EDGE, "out of\nmemory " + "x" * 500)
    assert change.new == "closed"
    assert change.edge.error.startswith("out of memory x")
    assert len(change.edge.error) == 300
    assert meter.record_error(("acme", "a", "b"), "gone").new == "open"
    # clean, an error, clean: the two count
    assert states(meter, CLEAN) == ["closed"]
    meter.record_error(EDGE, "gone")
    assert states(meter, CLEAN) == ["open"]
    assert meter.snapshot()[1].error == ""


def test_an_edge_that_forbids_nothing_any_more_is_open(meter: LeakageMeter) -> None:
    meter.record(LEAK)
    names = dict(zip(("tenant", "source", "audience"), EDGE, strict=True))
    change = meter.record({**names, "skipped": "forbids nothing"})
    assert (change.new, change.edge.skipped, change.edge.asr) == ("open", "forbids nothing", None)
    assert meter.record(LEAK).new == "closed"


@pytest.mark.parametrize(
    "broken",
    [
        {"asr": float("nan")},
        {"asr_low": float("nan")},
        {"asr": 0.0},
        {"recovered": 300},
        {"n_secrets": 0},
        {"asr_low": 0.9},
        {"asr_high": 1.1},
        {"guard_digest": ""},
        {"policy_digest": ""},
        {"asr": None},
        {"more": 1},
        {"tenant": None},
        {"skipped": "why"},
    ],
)
def test_inconsistent_results_are_refused(meter: LeakageMeter, broken: dict[str, Any]) -> None:
    """None of them may pass for clean."""
    meter.record(LEAK)
    for _ in range(2):
        with pytest.raises(ValueError, match="the screening cannot be used"):
            meter.record(CLEAN | broken)
        if "asr" in broken or "n_secrets" in broken:
            missing = {k: v for k, v in CLEAN.items() if k not in broken}
            with pytest.raises(ValueError, match="the screening cannot be used"):
                meter.record(missing)
    assert meter.verdict(*EDGE) == "closed"


def test_a_restart_forgets_nothing(meter: LeakageMeter, tmp_path: Path, clock: Clock) -> None:
    meter.record(LEAK)
    meter.record(CLEAN)
    meter.record_error(("acme", "a", "b"), "gone")
    again = opened(tmp_path, clock)
    assert again.snapshot() == meter.snapshot()
    assert again.verdict(*EDGE) == "closed"
    assert again.record(CLEAN).new == "open"  # the second in a row, of which one was before
    assert opened(tmp_path, clock).verdict(*EDGE) == "open"
    assert stat.S_IMODE((tmp_path / "leakage.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["leakage.json"]
    json.dumps([asdict(e) for e in again.snapshot()])


@pytest.mark.parametrize("cut", ["", "{", "null", "all but the end", "version", "state", "key"])
def test_a_broken_file_refuses_to_start(
    meter: LeakageMeter, tmp_path: Path, clock: Clock, cut: str
) -> None:
    meter.record(LEAK)
    path = tmp_path / "leakage.json"
    good = path.read_text()
    changed = {
        "all but the end": good[:-2],
        "version": good.replace('"version":1', '"version":2'),
        "state": good.replace('"state":"closed"', '"state":"ajar"'),
        "key": good.replace('"error":', '"errors":'),
    }.get(cut, cut)
    assert changed != good
    path.write_text(changed)
    with pytest.raises(LeakageError, match=r"leakage\.json: .*put back a copy") as caught:
        opened(tmp_path, clock)
    assert "\n" not in str(caught.value)
    assert path.read_text() == changed


def test_a_file_that_cannot_be_read_refuses_to_start(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "leakage.json").mkdir()
    with pytest.raises(LeakageError, match="cannot be read"):
        opened(tmp_path, clock)


def test_where_nothing_can_be_written_an_edge_closes_all_the_same(
    tmp_path: Path, clock: Clock
) -> None:
    folder = tmp_path / "state"
    meter = opened(folder, clock)
    meter.record(CLEAN)
    (folder / "leakage.json").unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert meter.record(LEAK).new == "closed"
    assert meter.verdict(*EDGE) == "closed"
    assert "cannot be written" in meter.error
    # an operator who opens has to know that it does not last
    with pytest.raises(LeakageError, match="cannot be written"):
        meter.reopen(EDGE, "root")
    assert meter.verdict(*EDGE) == "closed"
    folder.unlink()
    meter.record(LEAK)
    assert meter.error == ""
    assert opened(folder, clock).verdict(*EDGE) == "closed"


def test_stale_after_three_intervals(meter: LeakageMeter, clock: Clock) -> None:
    meter.record(CLEAN)
    meter.record_error(("acme", "a", "b"), "gone")
    clock.now_s += 3 * INTERVAL_S
    assert [e.stale for e in meter.snapshot()] == [False, False]
    clock.now_s += 1
    meter.record_error(EDGE, "still gone")  # an attempt is no result
    assert [e.stale for e in meter.snapshot()] == [True, True]
    meter.record(CLEAN)
    assert [e.stale for e in meter.snapshot()] == [True, False]


def test_history_is_bounded_and_in_order(meter: LeakageMeter, clock: Clock) -> None:
    for i in range(60):
        clock.now_s += 1
        meter.record(result(i % 40))
    (edge,) = meter.snapshot()
    assert len(edge.history) == 50
    assert [p.asr for p in edge.history] == [(i % 40) / 200 for i in range(10, 60)]
    assert edge.history[-1].at_s == clock.now_s == edge.measured_at_s


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_thresholds_that_mean_nothing(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        LeakageMeter(tmp_path / "leakage.json", threshold, INTERVAL_S)
