"""Planted records: the attack that reads them, the worker, and the schedule around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lcguard.server.database.writer import Database
from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.meter import EdgeLeakage, LeakageMeter
from tests.server.leakage.canary_bench import Bench, alive, found, pass_now, says, stop, until
from tests.server.leakage.canary_edges import EDGES, edge


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Database(tmp_path / "lcguard.sqlite") as database:
        yield Bench(LeakageMeter(database, 0.2, 3600))


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Timeout]:
    """Those of the workers: none passes by itself, ``pass_now`` lets one pass."""
    made: list[asyncio.Timeout] = []
    real = asyncio.timeout

    def timeout(delay_s: float | None) -> asyncio.Timeout:
        made.append(real(None))
        return made[-1]

    monkeypatch.setattr(asyncio, "timeout", timeout)
    return made


def test_results_reach_the_meter_and_changes_are_told(bench: Bench) -> None:
    runner = bench.runner(says(found("b", 90), found("c", 0)))
    assert asyncio.run(runner.run_now()) is True
    assert [bench.meter.verdict(*e) for e in EDGES] == ["closed", "open"]
    assert bench.changes == [("b", "open", "closed")]
    assert (runner.runs, runner.error) == (1, "")


def test_the_job_goes_through_stdin_alone(bench: Bench) -> None:
    check = (
        "token = '-'.join(('planted', 'token')); assert job['token'] == token;"
        "assert token not in open('/proc/self/cmdline').read() + open('/proc/self/environ').read()"
    )
    runner = bench.runner(says(found("b", 0), found("c", 0), more=check))
    assert asyncio.run(runner.run_now()) is True, bench.errors()


def test_a_leak_closes_before_the_worker_ends(bench: Bench) -> None:
    line = json.dumps({"result": found("b", 90)})
    runner = bench.runner(f"import time; print({line!r}, flush=True); time.sleep(600)")

    async def main() -> None:
        task = asyncio.ensure_future(runner.run_now())
        await until(lambda: bench.changes)
        assert bench.meter.verdict(*EDGES[0]) == "closed"
        assert not task.done()
        await stop(task)

    asyncio.run(main())


def test_what_a_late_worker_found_stays(bench: Bench, deadlines: list[asyncio.Timeout]) -> None:
    line = json.dumps({"result": found("b", 90)})
    runner = bench.runner(f"import time; print({line!r}, flush=True); time.sleep(600)", 5)

    async def main() -> bool | None:
        task = asyncio.ensure_future(runner.run_now())
        await until(lambda: bench.changes)
        pass_now(deadlines[0])
        return await task

    assert asyncio.run(main()) is True
    assert bench.changes == [("b", "open", "closed")]
    assert bench.errors() == ["", "the worker took more than 5 s"]


def test_those_that_waited_longest_go_first(bench: Bench) -> None:
    bench.meter.record(found("b", 0))
    check = "assert [e['audience'] for e in job['edges']] == ['c', 'b']"
    runner = bench.runner(says(found("b", 0), found("c", 0), more=check))
    assert asyncio.run(runner.run_now()) is True, bench.errors()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no room for planted-token')", "ended with 1: no room for ***"),
        ("import os; os.kill(os.getpid(), 11)", "ended with -11"),
        ("print('all is well')", "said nothing that is a result"),
        ("print('{\"results\": 3}')", "said nothing that is a result"),
        ("print('x' * 5_000_000)", "said nothing that is a result"),
        ("import sys; sys.stdout.buffer.write(b'\\xff' * 99)", "said nothing that is a result"),
        (says({"tenant": "t"}), "said nothing that is a result"),
        (says(found("b", 0) | {"asr": 0.5}, found("c", 0) | {"n_secrets": 0}), "cannot be used"),
        (says({"tenant": "t", "source": "a", "audience": "d", "asr": 0}), "left this edge out"),
        (says(code=3), "ended with 3"),
    ],
)
def test_a_worker_that_fails_is_an_error_of_its_edges(
    bench: Bench, code: str, message: str
) -> None:
    bench.meter.record(found("b", 90))
    runner = bench.runner(code)
    assert asyncio.run(runner.run_now()) is False
    assert all(message in e for e in bench.errors()), bench.errors()
    # neither opened nor closed
    assert [bench.meter.verdict(*e) for e in EDGES] == ["closed", "open"]
    assert bench.changes == []


def test_a_command_that_does_not_exist(bench: Bench) -> None:
    runner = bench.runner("")
    runner.command = ("/nowhere/worker",)
    assert asyncio.run(runner.run_now()) is False
    assert "cannot be started" in runner.error


def test_errors_of_some_edges(bench: Bench) -> None:
    names = {"tenant": "t", "source": "a", "audience": "b"}
    runner = bench.runner(says(names | {"error": "refused"}, found("c", 0)))
    assert asyncio.run(runner.run_now()) is True
    assert bench.errors() == ["refused", ""]
    # where all that could leak failed, an edge that forbids nothing is no success
    skipped = names | {"audience": "c", "skipped": "forbids nothing"}
    runner = bench.runner(says(names | {"error": "refused"}, skipped))
    assert asyncio.run(runner.run_now()) is False
    assert asyncio.run(bench.runner(says(names | {"skipped": "-"}, skipped)).run_now()) is True


def test_whoever_is_told_may_fail(bench: Bench) -> None:
    async def broken(edge: EdgeLeakage, old: str, new: str) -> None:
        raise RuntimeError("audit is gone")

    runner = bench.runner(says(found("b", 90), found("c", 90)), on_change=broken)
    assert asyncio.run(runner.run_now()) is True
    assert [bench.meter.verdict(*e) for e in EDGES] == ["closed", "closed"]


NEST = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = {path!r}
open(path + ".part", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename(path + ".part", path)
{then}
"""


@contextmanager
def nested(folder: Path, then: str) -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """A worker with a child of its own, and how to learn of their ids."""
    path = folder / "pids"

    def pids() -> list[int]:
        return [int(p) for p in path.read_text().split()] if path.exists() else []

    yield NEST.format(path=str(path), then=then), pids
    assert len(pids()) == 2
    # a signal takes effect when the machine comes to it
    asyncio.run(until(lambda: not any(alive(p) for p in pids())))


def test_a_worker_that_hangs_is_killed_with_its_children(
    bench: Bench, tmp_path: Path, deadlines: list[asyncio.Timeout]
) -> None:
    with nested(tmp_path, "time.sleep(600)") as (code, pids):
        runner = bench.runner(code, timeout_s=5)

        async def main() -> bool | None:
            task = asyncio.ensure_future(runner.run_now())
            await until(pids)  # the loop runs on meanwhile
            assert not task.done()
            pass_now(deadlines[0])
            return await task

        assert asyncio.run(main()) is False
        assert bench.errors() == ["the worker took more than 5 s"] * 2


def test_children_of_a_worker_that_ended_are_killed(bench: Bench, tmp_path: Path) -> None:
    """Also those that hold its output open, which would never end."""
    line = json.dumps({"results": [found("b", 0), found("c", 0)]})
    with nested(tmp_path, f"print({line!r})") as (code, _):
        assert asyncio.run(bench.runner(code).run_now()) is True


def test_a_child_that_left_the_group_holds_nothing_up(bench: Bench, tmp_path: Path) -> None:
    line = json.dumps({"results": [found("b", 0), found("c", 0)]})
    code = NEST.format(path=str(tmp_path / "pids"), then=f"print({line!r})")
    code = code.replace('600)"])', '600)"], start_new_session=True)')
    try:
        assert asyncio.run(bench.runner(code, timeout_s=60).run_now()) is True
        assert bench.errors() == ["", ""]
    finally:
        os.kill(int((tmp_path / "pids").read_text().split()[1]), signal.SIGKILL)


def test_shutdown_kills_the_worker(bench: Bench, tmp_path: Path) -> None:
    with nested(tmp_path, "time.sleep(600)") as (code, pids):

        async def main() -> None:
            task = asyncio.ensure_future(bench.runner(code, first_s=0).run())
            await until(pids)
            await stop(task)

        asyncio.run(main())


def run_for(runner: CanaryRunner, true: Callable[[], Any]) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(runner.run())
        await until(true)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_it_runs_soon_and_then_every_interval(bench: Bench) -> None:
    runner = bench.runner(says(found("b", 0), found("c", 0)), first_s=0, interval_s=0.05)
    run_for(runner, lambda: runner.runs >= 2)
    assert len(bench.meter.snapshot()[0].history) >= 2


def test_a_failed_run_is_tried_again_before_the_interval(bench: Bench) -> None:
    runner = bench.runner("raise SystemExit(1)", first_s=0, retry_s=0.01)
    run_for(runner, lambda: runner.runs >= 3)


def test_without_edges_it_looks_again_and_starts_nothing(bench: Bench) -> None:
    jobs = iter([{"edges": []}, {"edges": []}])
    runner = bench.runner(
        says(found("b", 0), found("c", 0)),
        first_s=0,
        retry_s=0.01,
        job=lambda: next(jobs, None) or bench.job(),
    )
    run_for(runner, lambda: runner.runs >= 1)
    assert bench.jobs == 1
    assert bench.errors() == ["", ""]


def test_a_job_that_cannot_be_made_ends_nothing(bench: Bench) -> None:
    calls: list[int] = []

    def job() -> dict[str, Any]:
        calls.append(0)
        raise ValueError("the policy is gone")

    runner = bench.runner("", first_s=0, retry_s=0.01, job=job)
    run_for(runner, lambda: len(calls) >= 3)
    assert runner.error == "ValueError: the policy is gone"


GOES = """
import json, sys
job = json.load(sys.stdin)
for e in job["edges"]:
    print(json.dumps({"result": NOTHING | {"audience": e["audience"]}}), flush=True)
"""
"""A worker that finds nothing on whatever edges it is told."""


def follower(bench: Bench, edges: list[dict[str, Any]]) -> CanaryRunner:
    """A runner whose policy is ``edges``, as they are when it looks."""
    code = f"NOTHING = {found('b', 0)!r}\n{GOES}"
    return bench.runner(code, job=lambda: {"edges": list(edges)}, first_s=0, look_s=0.02)


def screenings(bench: Bench) -> dict[str, int]:
    return {e.audience: len(e.history) for e in bench.meter.snapshot()}


def test_a_new_edge_is_screened_before_the_interval_and_the_others_are_not(bench: Bench) -> None:
    edges = [edge("b", "health")]
    runner = follower(bench, edges)

    async def main() -> None:
        task = asyncio.ensure_future(runner.run())
        await until(lambda: screenings(bench) == {"b": 1})
        edges.append(edge("c", "health"))
        await until(lambda: screenings(bench) == {"b": 1, "c": 1})
        await asyncio.sleep(0.3)
        assert (screenings(bench), runner.runs) == ({"b": 1, "c": 1}, 2)
        await stop(task)

    asyncio.run(main())


def test_an_edge_under_another_rule_is_screened_again(bench: Bench) -> None:
    edges = [edge("b", "health", guard="gate"), edge("c", "health", guard="gate")]
    runner = follower(bench, edges)

    async def main() -> None:
        task = asyncio.ensure_future(runner.run())
        await until(lambda: screenings(bench) == {"b": 1, "c": 1})
        edges[0] = edge("b", "health", guard="identity")
        await until(lambda: screenings(bench) == {"b": 2, "c": 1})
        await stop(task)

    asyncio.run(main())


def test_looking_for_new_edges_survives_a_broken_job(bench: Bench) -> None:
    edges = [edge("b", "health")]
    runner = follower(bench, edges)
    whole, broken, tried = runner._job, False, 0

    def job() -> dict[str, Any]:
        nonlocal tried
        if broken:
            tried += 1
            raise ValueError("the database is busy")
        return whole()

    runner._job = job

    async def main() -> None:
        nonlocal broken
        task = asyncio.ensure_future(runner.run())
        await until(lambda: runner.runs == 1)
        broken = True
        edges.append(edge("c", "health"))
        await until(lambda: tried > 1)
        assert (runner.runs, task.done()) == (1, False)
        broken = False
        await until(lambda: screenings(bench) == {"b": 1, "c": 1})
        await stop(task)

    asyncio.run(main())


def test_one_run_at_a_time(bench: Bench, tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    alone = f"import os, time; os.mkdir({lock!r}); time.sleep(0.2); os.rmdir({lock!r})"
    runner = bench.runner(says(found("b", 0), found("c", 0), more=alone))

    async def main() -> list[bool | None]:
        runs: list[Awaitable[bool | None]] = [runner.run_now() for _ in range(3)]
        return list(await asyncio.gather(*runs))

    assert asyncio.run(main()) == [True] * 3, bench.errors()
    assert runner.runs == 3
