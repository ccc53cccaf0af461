"""When an edge closes, what opens it again, and that neither is forgotten over a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lcguard.evaluation.intervals import wilson
from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.place import place_of
from lcguard.server.database.writer import Database
from lcguard.server.leakage.meter import LeakageError, LeakageMeter

pytest_plugins = ("tests.server.databases",)

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
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "lcguard.sqlite") as made:
        yield made


@pytest.fixture
def either(where: Path | str) -> Iterator[Database]:
    with Database(where) as made:
        yield made


@pytest.fixture
def meter(database: Database, clock: Clock) -> LeakageMeter:
    return opened(database, clock)


def opened(database: Database, clock: Clock) -> LeakageMeter:
    return LeakageMeter(database, 0.2, INTERVAL_S, clock)


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


def test_a_restart_forgets_nothing(either: Database, clock: Clock) -> None:
    database, meter = either, opened(either, clock)
    meter.record(LEAK)
    meter.record(CLEAN)
    meter.record_error(("acme", "a", "b"), "gone")
    again = opened(database, clock)
    assert again.snapshot() == meter.snapshot()
    assert again.verdict(*EDGE) == "closed"
    assert again.record(CLEAN).new == "open"  # the second in a row, of which one was before
    assert opened(database, clock).verdict(*EDGE) == "open"
    json.dumps([asdict(e) for e in again.snapshot()])


def test_what_one_closes_is_closed_for_others(where: Path | str, clock: Clock) -> None:
    """Two proxies: each asks the database, every time."""
    with Database(where) as one, Database(where) as other:
        meters = opened(one, clock), opened(other, clock)
        meters[0].record(LEAK)
        assert [m.verdict(*EDGE) for m in meters] == ["closed", "closed"]
        assert states(meters[1], CLEAN) == ["closed"]
        assert states(meters[0], CLEAN) == ["open"]  # the second in a row, of whichever proxy
        assert [m.verdict(*EDGE) for m in meters] == ["open", "open"]
        meters[0].record(LEAK)
        meters[1].reopen(EDGE, "root")
        assert [m.verdict(*EDGE) for m in meters] == ["open", "open"]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("screened", "", "JSON"),
        ("screened", "{", "JSON"),
        ("screened", '{"tenant": "acme"}', "source"),
        ("source", "other", "another edge's"),
    ],
)
def test_a_row_that_was_altered_refuses_to_start(
    meter: LeakageMeter, database: Database, clock: Clock, column: str, value: str, says: str
) -> None:
    meter.record(LEAK)
    database.write_now(lambda c: c.execute(f"UPDATE edges SET {column} = ?", (value,)))
    with pytest.raises(LeakageError, match=f"table edges, acme/.*{says}.*restore it") as caught:
        opened(database, clock)
    assert "\n" not in str(caught.value)


OLD_FILE = json.dumps(
    {
        "version": 1,
        "edges": [
            dict(zip(("tenant", "source", "audience"), EDGE, strict=True))
            | {"since_s": 1.0, "state": "closed", "reason": "100 of 200"}
        ],
    }
)


def test_the_file_of_the_release_before_is_taken_over(
    either: Database, tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "leakage.json"
    path.write_text(OLD_FILE)
    opened(either, clock).adopt_file(path)
    assert not path.exists()
    again = opened(either, clock)
    again.adopt_file(path)  # as at every later start
    assert again.verdict(*EDGE) == "closed"
    assert [e.reason for e in again.snapshot()] == ["100 of 200"]


@pytest.mark.parametrize("cut", ["", "{", "null", "all but the end", "version", "state", "key"])
def test_a_broken_file_refuses_to_start(
    meter: LeakageMeter, tmp_path: Path, clock: Clock, cut: str
) -> None:
    path = tmp_path / "leakage.json"
    changed = {
        "all but the end": OLD_FILE[:-2],
        "version": OLD_FILE.replace('"version": 1', '"version": 2'),
        "state": OLD_FILE.replace('"closed"', '"ajar"'),
        "key": OLD_FILE.replace('"reason":', '"reasons":'),
    }.get(cut, cut)
    assert changed != OLD_FILE
    path.write_text(changed)
    with pytest.raises(LeakageError, match=r"leakage\.json: .*put back a copy") as caught:
        meter.adopt_file(path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == changed
    assert meter.snapshot() == []


def test_a_file_that_cannot_be_read_refuses_to_start(meter: LeakageMeter, tmp_path: Path) -> None:
    (tmp_path / "leakage.json").mkdir()
    with pytest.raises(LeakageError, match="cannot be read"):
        meter.adopt_file(tmp_path / "leakage.json")


def test_where_nothing_can_be_written_an_edge_closes_all_the_same(
    either: Database, where: Path | str, clock: Clock
) -> None:
    other = ("acme", "intake", "clinic")
    states(opened(either, clock), CLEAN, LEAK | {"audience": "clinic"})
    with Database(where, busy_timeout_s=0.1) as tried, locked(where):
        meter = opened(tried, clock)
        assert meter.record(LEAK).new == "closed"
        assert meter.verdict(*EDGE) == "closed"
        assert meter.error
        # an operator who opens has to know that it does not last
        with pytest.raises(DatabaseError):
            meter.reopen(EDGE, "root")
        # and nothing opens what others closed
        meter.record(CLEAN | {"audience": "clinic", "guard_digest": "g2"})
        assert [meter.verdict(*name) for name in (EDGE, other)] == ["closed", "closed"]
        assert [e.state for e in meter.snapshot()] == ["closed", "closed"]
    with Database(where) as again:
        meter = opened(again, clock)
        assert meter.verdict(*EDGE) == "open"  # it was never written
        meter.record(LEAK)
        assert meter.error == ""
        assert opened(again, clock).verdict(*EDGE) == "closed"


@contextmanager
def locked(where: Path | str) -> Iterator[None]:
    """As by a writer that stands still."""
    place = place_of(where, 5.0)
    connection = place.begin(place.writer())
    yield
    connection.close()


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
def test_thresholds_that_mean_nothing(database: Database, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        LeakageMeter(database, threshold, INTERVAL_S)
