"""Planted records: the attack that reads them, the worker, and the schedule around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.nano.load import guard_path
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands.canary import Job, open_canaries, screen
from lcguard.commands.canary_plant import _layers
from lcguard.commands.canary_records import Words, fitting_records, screening_records
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.handoff.grants import new_handle
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.protocols import AttackData
from lcguard.records import IGNORE, TokenRecord, mask_of
from lcguard.segment import KVSegment
from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.meter import EdgeLeakage, LeakageMeter
from lcguard.store import open_store
from lcguard.training.dataset import attack_data, guard_all

KEY = "5a" * 32
EDGES = [("t", "a", "b"), ("t", "a", "c")]


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return load_backend("nano", "cpu")


@pytest.fixture(scope="module")
def guards(agent: HFBackend) -> dict[str, FrozenGuard]:
    shape = KVShape(*agent.source.shape)
    return {
        "identity": FrozenGuard(guard_class("identity").build(shape, len(CATEGORIES), {})),
        "gate": FrozenGuard.from_pretrained(guard_path("gate")),
    }


# -- the screening


def test_records_hold_what_is_forbidden_and_share_no_name(agent: HFBackend) -> None:
    forbid = ("person", "government_id")
    train = fitting_records(agent.encoder, forbid, 16, 3)
    test = screening_records(agent.encoder, forbid, 24, 4)
    assert (len(train), len(test)) == (16, 24)
    for record in (*train, *test):
        assert {s.category for s in record.secrets()} <= set(forbid)
        assert record.secrets()

    def names(records: list[TokenRecord]) -> set[str]:
        return {agent.decode(s.ids).strip() for r in records for s in r.secrets()}

    assert not names(train) & names(test)
    assert names(train) != names(fitting_records(agent.encoder, forbid, 16, 5))
    # a pair is one text: the values are where the spans say
    first = train[0]
    half = [s.positions[0] for s in first.secrets()]
    assert max(half) > len(first.ids) / 2 > min(half)


def test_chosen_records_teach_more_words(agent: HFBackend) -> None:
    """More values that the attack can name than from as many records as they come."""
    chosen = fitting_records(agent.encoder, CATEGORIES, 32, 3)
    hops = load_hops("generator", seed=3, split="coined", n=64, min_fields=7)[:64]
    test = screening_records(agent.encoder, CATEGORIES, 64, 11)

    def nameable(records: list[TokenRecord]) -> float:
        words = {t for r in records for t in r.ids}
        values = [set(s.ids) for r in test for s in r.secrets()]
        return sum(v <= words for v in values) / len(values)

    assert nameable(chosen) > nameable(agent.encoder.encode(hops)) + 0.03


def test_words_are_renamed_and_back(agent: HFBackend) -> None:
    train, test = (
        attack_data(r, agent.source.prefill([x.ids for x in r]), agent.special)
        for r in (
            fitting_records(agent.encoder, ("health",), 2, 1),
            screening_records(agent.encoder, ("health",), 8, 2),
        )
    )
    words = Words.of(train)
    renamed = words.rename(train)
    assert renamed.special.vocab == len(words.ids) + 1 < agent.special.vocab
    for old, new in zip(train.secrets, renamed.secrets, strict=True):
        assert [words.back(s.ids) for s in new] == [s.ids for s in old]
    kept = renamed.context_ids != IGNORE
    assert bool((kept == (train.context_ids != IGNORE)).all())
    assert words.back(renamed.context_ids[kept].tolist()) == tuple(train.context_ids[kept].tolist())
    unseen = words.rename(test).context_ids == len(words.ids)
    assert bool(unseen.any())
    assert words.back([len(words.ids)]) == (-1,)


@pytest.mark.slow
def test_an_open_guard_is_read_and_the_gate_is_not(
    agent: HFBackend, guards: dict[str, FrozenGuard]
) -> None:
    train = fitting_records(agent.encoder, CATEGORIES, 96, 21)
    test = screening_records(agent.encoder, CATEGORIES, 64, 22)
    raw = [agent.source.prefill([r.ids for r in rs], batch=16) for rs in (train, test)]

    def pairs(name: str) -> list[AttackData]:
        return [
            attack_data(
                rs,
                guard_all(guards[name], rs, kv, agent.source, agent.special, seed=i, batch=32),
                agent.special,
            )
            for i, (rs, kv) in enumerate(zip((train, test), raw, strict=True))
        ]

    leak = screen(*pairs("identity"), seed=5)
    assert leak.asr >= 0.9
    assert leak.asr_low < leak.asr == leak.recovered / leak.n_secrets < leak.asr_high
    assert leak.floor <= 0.05
    hidden = screen(*pairs("gate"), seed=5)
    assert hidden.n_secrets == leak.n_secrets > 150
    assert hidden.asr_high < 0.1
    with pytest.raises(ValueError, match="attack='trigger': for canaries there are probe"):
        screen(*pairs("gate"), "trigger")


@pytest.mark.parametrize(
    ("n", "channels", "kept"),
    [(4, 128, [0, 1, 2, 3]), (32, 2048, [0, 10, 21, 31]), (8, 9000, [0]), (3, 4096, [0, 2])],
)
def test_of_large_models_some_layers_are_kept(n: int, channels: int, kept: list[int]) -> None:
    assert _layers(n, channels) == kept


# -- the worker, before a stand-in for proxy and engine that guards and stores as they do


class Site(ThreadingHTTPServer):
    """Publishes what is planted, under the guard that is the audience's name."""

    def __init__(self, agent: HFBackend, guards: dict[str, FrozenGuard], store: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.agent, self.guards = agent, guards
        self.url, self.store = f"http://127.0.0.1:{self.server_port}", f"file://{store}"
        self.bodies: list[dict[str, Any]] = []
        self.refusals = 1  # of a proxy that is busy at first
        self.lock = threading.Lock()

    def answer(self, token: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        publish = body["lcguard"]["publish"]
        guard = self.guards.get(publish["audience"])
        if token != "Bearer planted" or guard is None:
            return 403, {"error": {"message": f"not for\n{publish['audience']}"}}
        if self.refusals:
            self.refusals -= 1
            return 503, {"error": {"message": "busy"}}
        self.bodies.append(body)
        kv = guard(self.agent.source.prefill([body["prompt"]]), mask_of([CATEGORIES], [()])).kv
        handle = new_handle()
        segment = KVSegment.create(
            kv.keys[0],
            kv.values[0],
            self.agent.source.config,
            model_id="nano",
            source_agent="t/a",
            guard_digest=guard.digest,
            policy_digest="0" * 64,
            handle=handle,
        )
        open_store(self.store).put(segment.sign(bytes.fromhex(KEY)))
        made = {"handle": handle, "guard": guard.name, "forbid": list(CATEGORIES), "derive": []}
        return 200, {"lcguard": {"published": made}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/completions"
        with self.server.lock:
            status, said = self.server.answer(self.headers["authorization"], body)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(agent: HFBackend, guards: dict[str, FrozenGuard], tmp_path: Path) -> Iterator[Site]:
    made = Site(agent, {**guards, "leaky": guards["identity"]}, tmp_path / "store")
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def edge(audience: str, *forbid: str, **more: Any) -> dict[str, Any]:
    return {"tenant": "t", "source": "a", "audience": audience, "forbid": list(forbid)} | more


def work(job: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lcguard.commands.canary"],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_worker_plants_screens_and_cleans_up(site: Site, tmp_path: Path) -> None:
    forbid = ("government_id", "health")
    job = {
        "base_url": site.url,
        "token": "planted",
        "model": "nano",
        "served_model": "served",
        "store": site.store,
        "train_records": 40,
        "test_records": 24,
        "seed": 7,
        "edges": [
            edge("identity", *forbid),
            edge("leaky", *forbid),
            edge("open"),
            edge("nobody", *forbid),
            edge("gate", *forbid, guard="redact"),
        ],
    }
    done = work(job)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    results = last["results"]
    assert [line["result"] for line in lines] == results
    assert [r["audience"] for r in results] == ["identity", "leaky", "open", "nobody", "gate"]
    leak, shared, skipped, refused, wrong = results
    assert leak["asr"] > 0.5 > leak["floor"]
    assert leak["n_secrets"] >= 24
    assert "shared_with" not in leak
    assert shared["shared_with"] == "t/a/identity"
    assert {k: shared[k] for k in ("asr", "guard_digest")} == {
        k: leak[k] for k in ("asr", "guard_digest")
    }
    assert skipped["skipped"] == "forbids nothing"
    assert refused["error"] == "the proxy answered 403: not for nobody"
    assert "published under guard 'gate', the job says 'redact'" in wrong["error"]
    # each is what the meter takes
    meter = LeakageMeter(tmp_path / "leakage.json", 0.2, 60)
    assert [meter.record(r).new for r in results[:3]] == ["closed", "closed", "open"]
    assert len(site.bodies) == 40 + 24 + 2
    first = site.bodies[0]
    assert (first["model"], first["max_tokens"]) == ("served", 1)
    text = "".join(site.agent.tokenizer.decode([i]) for i in first["prompt"])
    assert first["lcguard"]["publish"]["secrets"]
    assert all(s in text for s in first["lcguard"]["publish"]["secrets"])
    assert open_store(site.store).handles() == []
    assert "planted" not in done.stdout.replace("records planted", "")


def test_jobs_that_cannot_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    good = {
        "base_url": "http://127.0.0.1:9",
        "token": "planted",
        "model": "nano",
        "store": f"file://{tmp_path}",
        "served_model": "nano",
        "edges": [],
    }
    assert open_canaries(Job.model_validate(good)).results() == []
    for changed, message in (
        ({"store": "memory://x"}, "the store is within one process"),
        ({"base_url": "9"}, "base_url='9': write http://"),
        ({"model": str(tmp_path / "none")}, "the tokenizer of .* cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            open_canaries(Job.model_validate(good | changed))
    done = work(good | {"edgs": []})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "job: edgs: Extra inputs are not permitted"


# -- the schedule, with real processes


def found(audience: str, recovered: int) -> dict[str, Any]:
    share = recovered / 100
    return {
        "tenant": "t",
        "source": "a",
        "audience": audience,
        "n_secrets": 100,
        "recovered": recovered,
        "asr": share,
        "asr_low": max(0.0, share - 0.1),
        "asr_high": min(1.0, share + 0.1),
        "floor": 0.0,
        "attack": "probe",
        "seconds": 1.0,
        "guard": "gate",
        "guard_digest": "g",
        "policy_digest": "p",
    }


@dataclass
class Bench:
    """A runner with a worker in place of the real one."""

    meter: LeakageMeter
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    jobs: int = 0

    def job(self) -> dict[str, Any]:
        self.jobs += 1
        edges = [{"tenant": t, "source": s, "audience": a} for t, s, a in EDGES]
        return {"token": "planted-token", "edges": edges}

    async def changed(self, edge: EdgeLeakage, old: str, new: str) -> None:
        self.changes.append((edge.audience, old, new))

    def runner(
        self, code: str, timeout_s: float = 60, job: Callable[[], Any] | None = None, **more: Any
    ) -> CanaryRunner:
        return CanaryRunner(
            [sys.executable, "-c", code],
            job or self.job,
            self.meter,
            more.pop("interval_s", 3600),
            timeout_s,
            more.pop("on_change", self.changed),
            **more,
        )

    def errors(self) -> list[str]:
        return [e.error for e in self.meter.snapshot()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(LeakageMeter(tmp_path / "leakage.json", 0.2, 3600))


def says(*results: Any, more: str = "", code: int = 0) -> str:
    """A worker that reads its job, and prints these as a library chatters."""
    line = json.dumps({"results": results})
    return (
        f"import json, sys; job = json.load(sys.stdin); print('chatter'); {more}\n"
        f"print({line!r}); sys.exit({code})"
    )


async def until(true: Callable[[], Any], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.01)


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


def pass_now(deadline: asyncio.Timeout) -> None:
    deadline.reschedule(asyncio.get_running_loop().time())


async def stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def alive(pid: int) -> bool:
    """A process that is neither gone nor waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


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
    assert not [p for p in pids() if alive(p)]


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
