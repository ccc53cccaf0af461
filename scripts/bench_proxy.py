"""What the proxy costs: the same requests to vLLM directly and through it, paired in one run.

python scripts/bench_proxy.py --concurrency 32 --out benchmarks/results/proxy.json

``overhead_p50_ms``: each worker sends a request by both ways, in an order that changes, while the
others do the same; median of the pairs' differences at that concurrency. ``throughput_share``:
requests per second by the proxy over those sent directly, blocks of equal requests in turn.
``floor_p50_ms``: the same pairs through a relay of bare bytes, the least that a hop can cost here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from lcguard.commands.live_servers import Running, Site, free_port
from lcguard.commands.script import run_script, script_parser, write_report

WORDS = "record patient note amount status file branch visit order client report field".split()
FLOOR = """
import asyncio, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except OSError:
        pass
    writer.close()
async def handle(reader, writer):
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()
asyncio.run(main())
"""


@dataclass
class Way:
    """Where a request goes."""

    name: str
    url: str
    headers: dict[str, str]


def body(rng: random.Random, n_tokens: int, stream: bool) -> dict[str, Any]:
    """A chat request that no prefix cache has seen."""
    text = " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(24))
    return {
        "model": "nano",
        "temperature": 0,
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": "What is the status?"},
        ],
        **({"stream": True} if stream else {}),
    }


async def ask(session: aiohttp.ClientSession, way: Way, data: dict[str, Any]) -> float:
    """Milliseconds of one whole answer. Raises for any but 200."""
    started = time.perf_counter()
    async with session.post(
        way.url + "/v1/chat/completions", json=data, headers=way.headers
    ) as answer:
        found = await answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{way.name}: {answer.status} {found[:300]!r}")
    return (time.perf_counter() - started) * 1e3


async def chunks(session: aiohttp.ClientSession, way: Way, data: dict[str, Any]) -> list[float]:
    """Arrival times of a stream's pieces, in milliseconds from the request."""
    started, times = time.perf_counter(), []
    async with session.post(
        way.url + "/v1/chat/completions", json=data, headers=way.headers
    ) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{way.name}: {answer.status} {await answer.read()!r}")
        async for _ in answer.content.iter_any():
            times.append((time.perf_counter() - started) * 1e3)
    return times


async def pairs(
    session: aiohttp.ClientSession,
    first: Way,
    second: Way,
    n: int,
    concurrency: int,
    n_tokens: int,
    rng: random.Random,
) -> list[tuple[float, float]]:
    """Latencies of the same request both ways, ``concurrency`` workers at a time."""
    todo = [(body(rng, n_tokens, False), rng.random() < 0.5) for _ in range(n)]
    out: list[tuple[float, float]] = []

    async def worker() -> None:
        while todo:
            data, swapped = todo.pop()
            order = (second, first) if swapped else (first, second)
            spent = [await ask(session, way, data) for way in order]
            out.append((spent[1], spent[0]) if swapped else (spent[0], spent[1]))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return out


async def block(
    session: aiohttp.ClientSession, way: Way, requests: list[dict[str, Any]], concurrency: int
) -> float:
    """Requests per second."""
    todo = list(requests)

    async def worker() -> None:
        while todo:
            await ask(session, way, todo.pop())

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return len(requests) / (time.perf_counter() - started)


def difference(found: list[tuple[float, float]]) -> dict[str, float]:
    """Of pairs (direct, other): medians, and quantiles of the difference."""
    extra = sorted(b - a for a, b in found)
    return {
        "direct_p50_ms": round(statistics.median(a for a, _ in found), 3),
        "p50_ms": round(statistics.median(b for _, b in found), 3),
        "extra_p50_ms": round(statistics.median(extra), 3),
        "extra_p95_ms": round(extra[int(0.95 * (len(extra) - 1))], 3),
        "pairs": len(found),
    }


def gaps(streams: list[list[float]]) -> dict[str, float]:
    """Of streams: first piece, gaps between pieces, and how much comes at once at the end."""
    between = sorted(b - a for s in streams for a, b in pairwise(s))
    late = [sum(t > s[-1] - 1.0 for t in s) / len(s) for s in streams]
    return {
        "first_p50_ms": round(statistics.median(s[0] for s in streams), 3),
        "pieces": round(statistics.mean(len(s) for s in streams), 2),
        "gap_p50_ms": round(statistics.median(between), 3),
        "gap_p95_ms": round(between[int(0.95 * (len(between) - 1))], 3),
        "in_last_ms_share": round(statistics.mean(late), 4),
    }


async def measure(args: argparse.Namespace, ways: Sequence[Way]) -> dict[str, Any]:
    direct, proxy, floor = ways
    rng = random.Random(args.seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        for way in ways:  # connections, and the engine's own warm-up
            await block(session, way, [body(rng, 4, False) for _ in range(64)], args.concurrency)
        n, c, t = args.requests, args.concurrency, args.tokens
        shares, rates = [], []
        for r in range(args.rounds):
            order = [direct, proxy] if r % 2 else [proxy, direct]
            found = {}
            for way in order:
                made = [body(rng, t, False) for _ in range(n)]
                found[way.name] = await block(session, way, made, c)
            rates.append(found)
            shares.append(found["proxy"] / found["direct"])
        # short answers: the engine's own spread over a long one is larger than what is measured
        short, m = args.latency_tokens, args.pairs
        loaded = difference(await pairs(session, direct, proxy, m, c, short, rng))
        bare = difference(await pairs(session, direct, floor, m, c, short, rng))
        alone = difference(await pairs(session, direct, proxy, m // 4, 1, short, rng))
        bare_alone = difference(await pairs(session, direct, floor, m // 4, 1, short, rng))
        streams = {}
        for way in (direct, proxy):
            made = [body(rng, 64, True) for _ in range(24)]
            streams[way.name] = gaps([await chunks(session, way, x) for x in made])
    return {
        "overhead_p50_ms": loaded["extra_p50_ms"],
        "throughput_share": round(statistics.median(shares), 4),
        "floor_p50_ms": bare["extra_p50_ms"],
        "paired_at_concurrency": loaded,
        "floor_at_concurrency": bare,
        "paired_alone": alone,
        "floor_alone": bare_alone,
        "throughput_rps": {k: round(statistics.median(x[k] for x in rates), 2) for k in rates[0]},
        "shares": [round(x, 4) for x in shares],
        "streams": streams,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        concurrency=32,
        requests=(256, "in a block"),
        rounds=(5, "blocks of each way"),
        tokens=(64, "generated by each request"),
        pairs=1024,
        latency_tokens=(8, "generated in a pair"),
        seed=0,
    )
    args = parser.parse_args(argv)
    if min(args.concurrency, args.requests, args.rounds, args.tokens, args.latency_tokens) < 1 or (
        args.pairs < 8
    ):
        raise ValueError("use 1 or more, and at least 8 --pairs")
    with tempfile.TemporaryDirectory(prefix="lcguard-bench-") as folder:
        site = Site(Path(folder))
        key = site.key("bench")
        with site.engine() as engine, site.proxy(engine) as proxy:
            relay = start_floor(engine)
            try:
                ways = [
                    Way("direct", engine.url, {"Authorization": f"Bearer {engine.api_key}"}),
                    Way("proxy", proxy.url, {"Authorization": f"Bearer {key}"}),
                    Way("floor", relay.url, {"Authorization": f"Bearer {engine.api_key}"}),
                ]
                found = asyncio.run(measure(args, ways))
            finally:
                relay.stop()
    print(json.dumps(found, indent=1))
    found |= {"concurrency": args.concurrency, "tokens": args.tokens}
    command = f"python scripts/bench_proxy.py --concurrency {args.concurrency}"
    write_report(args, "Overhead of the proxy", command, found)
    return 0


def start_floor(engine: Running) -> Running:
    """A relay of bare bytes before vLLM."""
    port = free_port()
    target = engine.url.rsplit(":", 1)[1]
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOR, str(port), target], start_new_session=True
    )
    made = Running(process, f"http://127.0.0.1:{port}", engine.log, engine.api_key)
    made.wait("/health", 10)
    return made


if __name__ == "__main__":
    run_script(main)
