"""Load on several proxies of one PostgreSQL, one of which is killed: what is lost or exceeded.

LCGUARD_DATABASE_PASSWORD=... python scripts/soak_proxies.py --requests 5000 \\
    --database postgresql://me@host/empty --store redis://host --out benchmarks/results/proxies.json

The clients of scripts/soak.py, each request to one of the proxies, and an agent of another tenant
that asks for everybody's segments. Each proxy has an engine of its own; they share the store. In
the middle, of the requests or of the minutes, one proxy gets SIGKILL; so does a worker of an
evaluation that runs on Ray beside the load, once it has begun. Exit 1 where a row that a client was
told of is missing, a budget was exceeded, another tenant was served, an answer of a living proxy
did not come, the audit is not whole, or the evaluation's journal is not what one without Ray
writes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from soak import AGENTS, POLICY, WEIGHTS, Load, Seen, audited, quantiles

from lcguard.commands.live_servers import Running, Site
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.config import dump_config
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.server.database.place import place_of, reading

BUDGET = 4
"""Segments of one source that an audience may receive."""
STRANGER = "stranger"
EXCEEDED = (
    "SELECT count(*) FROM (SELECT 1 FROM received GROUP BY tenant, audience, source "
    "HAVING count(*) > ?) AS over"
)
CROSSED = (
    "SELECT count(*) FROM received JOIN segments ON segments.handle = received.handle "
    "WHERE segments.tenant <> received.tenant OR segments.audience <> received.audience"
)

EVALUATION = EvalConfig(
    title="beside the load",
    data=DataConfig(seed=31, train_records=48, test_records=16),
    guards=(GuardSpec("identity", guard="identity"), GuardSpec("gate", path="nano:gate")),
    attacks=(
        AttackSpec("probe", "probe", {"fit": {"steps": 20}}),
        AttackSpec("decoder", options={"width": 32, "fit": {"steps": 20}}),
    ),
    injection=False,
    broken_at=None,
    explain=0,
)


class Evaluation:
    """An evaluation in a process of its own, whose journal must not depend on the executor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.killed = 0
        """After how many requests of the load a worker was killed."""

    def start(self, executor: str) -> subprocess.Popen[bytes]:
        self.folder.mkdir(exist_ok=True)
        plan = self.folder / "plan.yaml"
        plan.write_text(dump_config(EVALUATION))
        words = [sys.executable, "-m", "lcguard.cli", "eval", "run", str(plan)]
        words += ["--out", str(self.folder / executor), "--executor", executor]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def lose_a_worker(self, count: Callable[[], int]) -> None:
        """Starts it on Ray, and kills the first worker that has something to do."""
        self.process = self.start("ray")
        while not self.killed and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if child.name().startswith("ray::_run"):
                        child.kill()
                        self.killed = count()
                        break
                except psutil.NoSuchProcess:
                    continue
            await asyncio.sleep(0.01)

    def measured(self) -> dict[str, Any]:
        """Once it has ended, beside one without Ray."""
        assert self.process is not None
        codes = {"ray": self.process.wait(), "local": self.start("local").wait()}
        journals = []
        for name, code in codes.items():
            file = RunFolder(self.folder / name).journal_file
            journals.append(file.read_bytes() if code == 0 and file.exists() else name.encode())
        return {
            "exit_codes": codes,
            "worker_killed_after": self.killed,
            "journal_bytes": len(journals[0]),
            "same_journal": journals[0] == journals[1],
        }


class Cluster(Load):
    """Clients that lose the proxy they were asking, and go on with another."""

    weights = WEIGHTS | {"stranger": 10}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.killed = ""
        self.killed_after = 0
        """How many requests."""
        self.n_lost = 0
        """Answers of the killed proxy that did not come."""

    def kill(self, running: Running) -> None:
        self.killed, self.killed_after = running.url, self.n
        self.urls.remove(running.url)
        os.kill(running.process.pid, signal.SIGKILL)

    def _broken(self, error: Exception) -> str:
        name, url = self.asked[asyncio.current_task()]
        if url != self.killed:
            return super()._broken(error)
        self.seen.left.add(name)  # nobody was told how it ended
        self.n_lost += 1
        return "killed"

    async def _stranger(self) -> int:
        """The audience's namesake of another tenant."""
        found = self._segment()
        handle = found[0] if found else "A" * 32
        data = self._body(2, prompt="What is it?", lcguard={"consume": [handle]})
        return (await self._whole(STRANGER, data))[1]


async def load_on(
    proxies: Sequence[Running],
    keys: dict[str, str],
    evaluation: Evaluation,
    args: argparse.Namespace,
) -> Cluster:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        load = Cluster(session, [p.url for p in proxies], keys, args.seed)

        started_s = time.monotonic()

        def done() -> float:
            """Of the requests or of the time, whichever is spent first."""
            return max(load.n / args.requests, (time.monotonic() - started_s) / args.minutes / 60)

        async def killer() -> None:
            while done() < 0.5:
                await asyncio.sleep(0.05)
            load.kill(proxies[-1])

        beside = evaluation.lose_a_worker(lambda: load.n)

        workers = [load.worker(lambda: done() < 1) for _ in range(args.concurrency)]
        await asyncio.gather(killer(), beside, *workers)
    return load


def stored(database: str) -> dict[str, int]:
    """What the ledger says of budgets and tenants."""
    with reading(place_of(database, 5.0)) as connection:
        (exceeded,) = connection.execute(EXCEEDED, (BUDGET,)).fetchone()
        (crossed,) = connection.execute(CROSSED).fetchone()
        (received,) = connection.execute("SELECT count(*) FROM received").fetchone()
    return {"received": received, "budgets_exceeded": exceeded, "crossed_tenants": crossed}


def measured(load: Cluster, database: str, key: bytes, seconds: float) -> dict[str, Any]:
    seen: Seen = load.seen
    statuses = {kind: dict(found) for kind, found in sorted(seen.statuses.items())}
    answered = [ms for spent in seen.spent.values() for _, ms in spent]
    return {
        "requests": load.n,
        "seconds": round(seconds, 1),
        "statuses": statuses,
        "proxy_killed_after": load.killed_after,
        "lost_with_the_killed": load.n_lost,
        "n_broken": seen.broken,
        "n_5xx_without_reason": seen.silent_5xx,
        "strangers_served": Counter(statuses.get("stranger", {})).get("200", 0),
        "ledger": stored(database),
        "audit": audited(database, key, seen),
        "latency": quantiles(answered),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        concurrency=16,
        requests=5000,
        minutes=60.0,
        proxies=2,
        database="",
        store="",
        seed=0,
    )
    args = parser.parse_args(argv)
    if not args.database.startswith("postgres") or args.proxies < 2 or args.requests < 10:
        raise ValueError("--database postgresql://..., --proxies 2 and --requests 10 at least")
    edges = [edge | {"max_segments": BUDGET} for edge in POLICY["edges"]]
    with tempfile.TemporaryDirectory(prefix="lcguard-proxies-") as folder, ExitStack() as stack:
        site = Site(Path(folder) / "site", POLICY | {"edges": edges})
        keys = {agent: site.key(agent) for agent in AGENTS}
        keys[STRANGER] = site.key(AGENTS[0], "another")
        store, proxies = args.store or site.store, []
        for i in range(args.proxies):
            one = Site(Path(folder) / f"proxy-{i}")
            one.environment, one.policy, one.store = site.environment, site.policy, store
            engine = stack.enter_context(one.engine())
            shared = {"policy": str(site.policy), "keys": str(site.folder / "keys.yaml")}
            proxies.append(
                stack.enter_context(
                    one.proxy(engine, store=store, database=args.database, **shared)
                )
            )
        evaluation = Evaluation(Path(folder) / "evaluation")
        started = time.monotonic()
        load = asyncio.run(load_on(proxies, keys, evaluation, args))
        seconds = time.monotonic() - started
        for proxy in proxies:  # whatever was on its way has its row then
            proxy.stop()
        beside = evaluation.measured()
        key = bytes.fromhex(site.environment["LCGUARD_KEY"])
        found = measured(load, args.database, key, seconds) | {
            "store": (args.store or "file").split(":")[0],
            "evaluation": beside,
        }
    wrong = {
        "a row is lost": found["audit"]["lost"],
        "the audit is altered": found["audit"]["problems"],
        "a handoff that nobody was told of": found["audit"]["untold"],
        "a budget was exceeded": found["ledger"]["budgets_exceeded"],
        "another tenant was served": found["strangers_served"] + found["ledger"]["crossed_tenants"],
        "an answer did not come": found["n_broken"],
        "a 5xx without a reason": found["n_5xx_without_reason"],
        "nobody was killed meanwhile": not (
            0 < load.killed_after < load.n and 0 < beside["worker_killed_after"] < load.n
        ),
        "the evaluation is another one than without Ray": not beside["same_journal"],
    }
    found["failed"] = [what for what, is_wrong in wrong.items() if is_wrong]
    command = f"python scripts/soak_proxies.py --requests {args.requests} --proxies {args.proxies}"
    print({k: v for k, v in found.items() if k != "statuses"})
    write_report(args, "Several proxies, one killed", command, found)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    run_script(main)
