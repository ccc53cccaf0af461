"""Load on ``lcguard serve`` with its own vLLM for minutes: what leaks, what is lost, what breaks.

python scripts/soak.py --concurrency 32 --minutes 10 --out benchmarks/results/soak.json

Chats, streams, handoffs, refusals, malformed requests and clients that hang up, mixed. Exit 1 where
the proxy's memory grows by more than 10% in the second half, a 5xx gives no reason, an answer does
not come, or the audit is not exactly what clients were told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Running, Site
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.server.audit.verify import verify
from lcguard.server.database.place import place_of, reading

WEIGHTS = {
    "chat": 25,
    "stream": 20,
    "publish": 15,
    "consume": 15,
    "refused": 10,
    "malformed": 8,
    "hangs_up": 7,
}
AGENTS = [f"agent-{i}" for i in range(8)]
WORDS = "record patient note amount status file branch visit order client report field".split()
JUNK = (
    b"",
    b"[]",
    b"{",
    b"\xff",
    b'{"prompt": 5}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": "a", "lcguard": {"publish": 5}}',
    b'{"prompt": "a", "n": "2"}',
)
POLICY = {
    "version": 1,
    "edges": [
        {"source": "*", "audience": "*", "forbid": list(CATEGORIES), "guard": "gate", "ttl_s": 300},
    ],
}
STORE_BYTES = 64 * 2**20
GROWTH = 0.10
WINDOWS = 10
FRESH_S = 20.0
"""Younger segments are consumed: older ones may have made room in the store."""


@dataclass
class Seen:
    """What the clients saw."""

    started_s: float = field(default_factory=time.monotonic)
    spent: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Kind -> (when, latency in ms) of each answer."""
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    told: dict[str, str] = field(default_factory=dict)
    """Request id -> how its handoff ended: published, consumed or refused."""
    left: set[str] = field(default_factory=set)
    """Request ids of clients that hung up: nobody was told how theirs ended."""
    fresh: deque[tuple[float, str, str]] = field(default_factory=lambda: deque(maxlen=256))
    """(when, handle, audience) of published segments."""
    silent_5xx: int = 0
    broken: int = 0
    """Answers that did not come, or ended too early."""


class Load:
    """The clients."""

    weights = WEIGHTS

    def __init__(
        self, session: aiohttp.ClientSession, urls: Sequence[str], keys: dict[str, str], seed: int
    ) -> None:
        """``urls``: proxies of one deployment."""
        self.session, self.urls, self.keys, self.seen = session, list(urls), keys, Seen()
        self.rng = random.Random(seed)
        self.asked: dict[asyncio.Task[Any] | None, tuple[str, str]] = {}
        """Of each worker, its last request and the proxy that it went to."""
        self.n = 0

    async def worker(self, going: Callable[[], bool]) -> None:
        """One client after the other."""
        while going():
            (kind,) = self.rng.choices(list(self.weights), list(self.weights.values()))
            started = time.monotonic()
            try:
                status = await getattr(self, f"_{kind}")()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                status = self._broken(error)
            self.seen.statuses[kind][str(status)] += 1
            now = time.monotonic()
            self.seen.spent[kind].append((now - self.seen.started_s, (now - started) * 1e3))

    def _broken(self, error: Exception) -> str:
        """An answer that did not come, or ended too early."""
        self.seen.broken += 1
        return type(error).__name__

    def _prompt(self) -> str:
        return " ".join(self.rng.choice(WORDS) + str(self.rng.randrange(1000)) for _ in range(24))

    def _ask(self, agent: str, data: Any, **more: Any) -> Any:
        """The request, under an id of its own."""
        self.n += 1
        name, url = f"soak-{self.n}", self.rng.choice(self.urls)
        self.asked[asyncio.current_task()] = name, url
        chat = isinstance(data, dict) and "messages" in data
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        headers = {
            "Authorization": f"Bearer {self.keys[agent]}",
            "X-Request-Id": name,
            "Content-Type": "application/json",
        }
        return name, self.session.post(url + path, data=body, headers=headers, **more)

    def _body(self, n_tokens: int = 16, **more: Any) -> dict[str, Any]:
        return {
            "model": "nano",
            "temperature": 0,
            "max_tokens": n_tokens,
            "ignore_eos": True,
            **more,
        }

    async def _whole(self, agent: str, data: Any) -> tuple[str, int, Any]:
        name, asked = self._ask(agent, data)
        async with asked as answer:
            found = json.loads(await answer.read())
            if answer.status >= 500 and not (found.get("error") or {}).get("message"):
                self.seen.silent_5xx += 1
            return name, answer.status, found

    async def _chat(self) -> int:
        messages = [
            {"role": "system", "content": self._prompt()},
            {"role": "user", "content": "What is the status?"},
        ]
        return (await self._whole(self.rng.choice(AGENTS), self._body(messages=messages)))[1]

    async def _stream(self) -> int:
        data = self._body(32, prompt=self._prompt(), stream=True)
        _, asked = self._ask(self.rng.choice(AGENTS), data)
        async with asked as answer:
            text = await answer.read()
            if answer.status == 200 and not text.endswith(b"data: [DONE]\n\n"):
                raise ValueError("the stream has no end")
            return int(answer.status)

    async def _publish(self) -> int:
        source, audience = self.rng.sample(AGENTS, 2)
        data = self._body(2, prompt=self._prompt(), lcguard={"publish": {"audience": audience}})
        name, status, found = await self._whole(source, data)
        if status == 200:
            self.seen.told[name] = "published"
            handle = found["lcguard"]["published"]["handle"]
            self.seen.fresh.append((time.monotonic(), handle, audience))
        return status

    def _segment(self) -> tuple[str, str] | None:
        now = time.monotonic()
        live = [(h, a) for at, h, a in self.seen.fresh if now - at < FRESH_S]
        return self.rng.choice(live) if live else None

    async def _consume(self) -> int:
        found = self._segment()
        if found is None:
            return await self._publish()
        handle, audience = found
        data = self._body(prompt="What is it?", lcguard={"consume": [handle]})
        name, status, _ = await self._whole(audience, data)
        if status == 200:
            self.seen.told[name] = "consumed"
        return status

    async def _refused(self) -> int:
        """Somebody else's segment, or one that never was."""
        handle, audience = self._segment() or ("A" * 32, AGENTS[0])
        other = self.rng.choice([a for a in AGENTS if a != audience])
        data = self._body(prompt="What is it?", lcguard={"consume": [handle]})
        name, status, _ = await self._whole(other, data)
        if status in (403, 404):
            self.seen.told[name] = "refused"
        return status

    async def _malformed(self) -> int:
        return (await self._whole(self.rng.choice(AGENTS), self.rng.choice(JUNK)))[1]

    async def _hangs_up(self) -> str:
        """In the middle of an answer, or before it; every other time while publishing."""
        source, audience = self.rng.sample(AGENTS, 2)
        more = {"lcguard": {"publish": {"audience": audience}}} if self.rng.random() < 0.5 else {}
        streamed = self.rng.random() < 0.5
        data = self._body(512, prompt=self._prompt(), stream=streamed, **more)
        name, asked = self._ask(source, data)
        self.seen.left.add(name)
        try:
            async with asyncio.timeout(None if streamed else self.rng.uniform(0.01, 1.0)):
                async with asked as answer:
                    if not streamed:
                        await answer.read()
                    await answer.content.readany()
                    answer.close()
                    return f"{answer.status}, then left"
        except TimeoutError:
            return "left"


async def watch(running: Running, every_s: float, out: list[dict[str, float]]) -> None:
    """Memory and open files of the proxy's process, until cancelled."""
    folder, started = Path(f"/proc/{running.process.pid}"), time.monotonic()
    while True:
        (line,) = [x for x in (folder / "status").read_text().splitlines() if "VmRSS" in x]
        out.append(
            {
                "at_s": round(time.monotonic() - started, 2),
                "rss_mib": round(int(line.split()[1]) / 1024, 2),
                "files": len(os.listdir(folder / "fd")),
            }
        )
        await asyncio.sleep(every_s)


def memory(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Straight line through the second half."""
    rss, n = [s["rss_mib"] for s in samples], len(samples)
    times = [s["at_s"] / 60 for s in samples]
    line = statistics.linear_regression(times[n // 2 :], rss[n // 2 :])
    first, last = (line.intercept + line.slope * t for t in (times[n // 2], times[-1]))
    quarter = max(1, n // 4)
    return {
        "slope_mib_per_min": round(line.slope, 4),
        "growth_second_half": round(last / first - 1, 4),
        "first_quarter_mib": round(statistics.mean(rss[:quarter]), 2),
        "last_quarter_mib": round(statistics.mean(rss[-quarter:]), 2),
        "files_first": samples[0]["files"],
        "files_last": samples[-1]["files"],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Of latencies in ms."""
    ordered = sorted(values)
    cut = {f"p{q}_ms": round(ordered[int(q / 100 * (len(ordered) - 1))], 1) for q in (50, 95, 99)}
    return {"n": len(ordered), **cut}


def latencies(seen: Seen, seconds: float) -> dict[str, Any]:
    """By kind: of all, and of each tenth of the time."""
    out: dict[str, Any] = {}
    for kind, spent in sorted(seen.spent.items()):
        parts: list[list[float]] = [[] for _ in range(WINDOWS)]
        for at_s, ms in spent:
            parts[min(WINDOWS - 1, int(at_s / seconds * WINDOWS))].append(ms)
        out[kind] = quantiles([ms for _, ms in spent]) | {
            "over_time": [quantiles(p) if p else None for p in parts]
        }
    return out


def audited(database: Path | str, key: bytes, seen: Seen) -> dict[str, Any]:
    """The audit's rows against what clients were told."""
    found = verify(database, key)
    rows: dict[str, list[str]] = defaultdict(list)
    with reading(place_of(database, 5.0)) as connection:
        for name, event in connection.execute("SELECT request_id, event FROM audit ORDER BY seq"):
            rows[name].append(event)
    wanted = {
        "published": ["publish", "published"],
        "consumed": ["consume", "consumed"],
        "refused": ["refused"],
    }
    lost = [name for name, ended in seen.told.items() if rows[name] != wanted[ended]]
    known = seen.told.keys() | seen.left
    ended = {"published", "consumed"}
    untold = [n for n, events in rows.items() if n not in known and ended & set(events)]
    return {
        "rows": found.rows,
        "problems": found.problems,
        "told": dict(Counter(seen.told.values())),
        "lost": len(lost),
        "untold": len(untold),
        "examples": [[n, rows[n]] for n in (lost + untold)[:10]],
        "events": dict(Counter(e for events in rows.values() for e in events)),
    }


async def soak(
    args: argparse.Namespace, proxy: Running, keys: dict[str, str]
) -> tuple[Seen, list[dict[str, float]]]:
    seconds, samples = args.minutes * 60, list[dict[str, float]]()
    # shorter than the proxy's: a connection that it closes meanwhile is no lost answer
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        load = Load(session, [proxy.url], keys, args.seed)
        until_s = time.monotonic() + seconds
        watching = asyncio.ensure_future(watch(proxy, min(10.0, seconds / 12), samples))
        workers = [load.worker(lambda: time.monotonic() < until_s) for _ in range(args.concurrency)]
        await asyncio.gather(*workers)
        watching.cancel()
    return load.seen, samples


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, concurrency=32, minutes=10.0, seed=0)
    args = parser.parse_args(argv)
    if args.concurrency < 1 or args.minutes <= 0:
        raise ValueError("--concurrency and --minutes: use 1 or more, and above 0")
    with tempfile.TemporaryDirectory(prefix="lcguard-soak-") as folder:
        site = Site(Path(folder), POLICY)
        keys = {agent: site.key(agent) for agent in AGENTS}
        with site.proxy(store_max_bytes=STORE_BYTES) as proxy:
            seen, samples = asyncio.run(soak(args, proxy, keys))
        # stopped: whatever was on its way has its row
        key = bytes.fromhex(site.environment["LCGUARD_KEY"])
        audit = audited(Path(folder) / "lcguard.sqlite", key, seen)
    statuses = {kind: dict(found) for kind, found in sorted(seen.statuses.items())}
    n_5xx = sum(n for found in statuses.values() for s, n in found.items() if s.startswith("5"))
    found: dict[str, Any] = {
        "requests": sum(sum(s.values()) for s in statuses.values()),
        "statuses": statuses,
        "n_5xx": n_5xx,
        "n_5xx_without_reason": seen.silent_5xx,
        "n_broken": seen.broken,
        "memory": memory(samples),
        "audit": audit,
        "latency": latencies(seen, args.minutes * 60),
        "samples": samples,
    }
    wrong = {
        "memory grows": found["memory"]["growth_second_half"] > GROWTH,
        "a 5xx without a reason": seen.silent_5xx,
        "an answer did not come": seen.broken,
        "the audit is altered": audit["problems"],
        "a row is lost": audit["lost"],
        "a handoff that nobody was told of": audit["untold"],
    }
    failed = [what for what, is_wrong in wrong.items() if is_wrong]
    found["failed"] = failed
    command = f"python scripts/soak.py --concurrency {args.concurrency} --minutes {args.minutes:g}"
    print(json.dumps({k: v for k, v in found.items() if k not in ("samples", "latency")}, indent=1))
    write_report(args, "Soak of the proxy", command, found)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
