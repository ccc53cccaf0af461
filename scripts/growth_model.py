"""A deployment as a discrete-event model: proxies, engines that work in steps, a store of segments.

For ``simulate_growth``. Costs are milliseconds of one machine, taken from files of results.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import simpy

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PROMPT_TOKENS = 120
"""Of a request of ``bench_proxy`` and ``soak``: 24 words with numbers, and a question."""
Process = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Costs:
    """Milliseconds, but for bytes."""

    step: float
    """Of an engine's step, whatever runs in it."""
    token: float
    """More for each request that runs."""
    prefill_token: float
    """More for each token of a prompt that a step takes in."""
    front: float
    """Of a request alone, outside the engine's steps: HTTP, tokenizer, queues between processes."""
    proxy: float
    """Of a proxy's processor for a request."""
    publish: float
    """An engine's, for a context of ``context_tokens``: prefill, guard and save."""
    consume: float
    """An engine's, for taking in its segment."""
    context_tokens: int
    segment_bytes: int


def measured(context_tokens: int) -> Costs:
    """Costs from the files of results. Raises ``ValueError`` for a context not measured."""
    handoff, proxy, publish = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("handoff", "proxy", "publish")
    )
    rows = {r["tokens"]: r for r in handoff["rows"]}
    if context_tokens not in rows:
        raise ValueError(f"--context {context_tokens}: measured were {', '.join(map(str, rows))}")
    few, more = min(rows), sorted(rows)[2]
    per_token = rows[more]["ttft_ms"]["text"] - rows[few]["ttft_ms"]["text"]
    prefill = per_token / (more - few)
    alone = proxy["streams"]["direct"]
    # the longer answers: so many requests at a time, a step for each of their tokens
    busy = proxy["concurrency"] / proxy["throughput_rps"]["direct"] / proxy["tokens"] * 1e3
    running = busy - proxy["concurrency"] / proxy["tokens"] * prefill * PROMPT_TOKENS
    token = max(0.0, running - alone["gap_p50_ms"]) / (proxy["concurrency"] - 1)
    step = alone["gap_p50_ms"] - token
    row, largest = rows[context_tokens], publish["rows"][-1]
    return Costs(
        step=step,
        token=token,
        prefill_token=prefill,
        front=max(0.0, alone["first_p50_ms"] - step - token - prefill * PROMPT_TOKENS),
        proxy=proxy["paired_alone"]["extra_p50_ms"],
        publish=max(0.0, row["publish_ms"]["guarded"] - step - token),
        consume=max(0.0, row["ttft_ms"]["guarded"] - step - token),
        context_tokens=context_tokens,
        segment_bytes=round(largest["segment_bytes"] / largest["tokens"] * context_tokens),
    )


class Station:
    """One who serves one after the other, such as a proxy's processor."""

    def __init__(self, env: simpy.Environment, service_ms: Callable[[], float]) -> None:
        self.env, self.service_ms = env, service_ms
        self.free = simpy.Resource(env)

    def serve(self) -> Process:
        with self.free.request() as turn:
            yield turn
            yield self.env.timeout(self.service_ms())


class Engine:
    """Steps as long as there is something to do."""

    def __init__(self, env: simpy.Environment, costs: Costs) -> None:
        self.env, self.costs = env, costs
        self.waiting: deque[tuple[float, int, simpy.Event]] = deque()
        self.running: list[list[Any]] = []
        self.woken = env.event()
        env.process(self._run())

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def ask(self, work_ms: float, tokens: int) -> simpy.Event:
        """Ends when the last of ``tokens`` is there; ``work_ms`` of the step that takes it in."""
        done = self.env.event()
        self.waiting.append((work_ms, tokens, done))
        if not self.woken.triggered:
            self.woken.succeed()
        return done

    def abort(self, done: simpy.Event) -> None:
        """Nobody waits for it any more."""
        self.waiting = deque(w for w in self.waiting if w[2] is not done)
        self.running = [r for r in self.running if r[1] is not done]

    def _run(self) -> Process:
        c = self.costs
        while True:
            if not self.load:
                self.woken = self.env.event()
                yield self.woken
            work = 0.0
            while self.waiting:
                spent, tokens, done = self.waiting.popleft()
                work += spent
                self.running.append([tokens, done])
            yield self.env.timeout(c.step + c.token * len(self.running) + work)
            for request in self.running:
                request[0] -= 1
                if request[0] <= 0:
                    request[1].succeed()
            self.running = [r for r in self.running if r[0] > 0]


@dataclass
class Store:
    """Segments by age; the oldest make room."""

    most_bytes: float = math.inf
    held: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    peak_bytes: int = 0

    def put(self, name: int, size: int) -> None:
        while self.held and self.bytes + size > self.most_bytes:
            self.drop(next(iter(self.held)))
        self.held[name] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def drop(self, name: int) -> None:
        self.bytes -= self.held.pop(name, 0)


@dataclass(frozen=True)
class Plan:
    """One deployment and its load."""

    per_hour: float
    engines: int
    proxies: int = 1
    handoffs: int = 2000
    answer_tokens: int = 64
    pause_ms: float = 1000.0
    """Between a publish and its consume, on average."""
    ttl_ms: float = 300_000.0
    store_bytes: float = math.inf
    seed: int = 0


class Site:
    """A deployment in which handoffs happen."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan, self.costs, self.env = plan, costs, simpy.Environment()
        self.rng = random.Random(plan.seed)
        self.engines = [Engine(self.env, costs) for _ in range(plan.engines)]
        self.proxies = [Station(self.env, lambda: costs.proxy) for _ in range(plan.proxies)]
        self.store = Store(plan.store_bytes)
        self.publish_ms: list[float] = []
        self.consume_ms: list[float] = []
        self.whole_ms: list[float] = []
        """Of handoffs that came through: both, without the pause."""
        self.arrived = self.gone = self.inside = 0
        self.area = 0.0
        """Of requests in the system over time, for Little's law."""
        self._last = 0.0

    def run(self) -> Site:
        self.env.process(self._arrivals())
        self.env.run()
        return self

    def _arrivals(self) -> Process:
        mean_ms = 3_600_000 / self.plan.per_hour
        for name in range(self.plan.handoffs):
            yield self.env.timeout(self.rng.expovariate(1 / mean_ms))
            self.arrived += 1
            self.env.process(self._handoff(name))

    def _count(self, change: int) -> None:
        self.area += self.inside * (self.env.now - self._last)
        self._last = self.env.now
        self.inside += change

    def _request(self, work_ms: float, tokens: int) -> Process:
        """Through a proxy to the engine with the least to do; milliseconds that it took."""
        started = self.env.now
        self._count(1)
        yield self.env.process(self.rng.choice(self.proxies).serve())
        yield self.env.timeout(self.costs.front)
        yield min(self.engines, key=lambda e: e.load).ask(work_ms, tokens)
        self._count(-1)
        return self.env.now - started

    def _handoff(self, name: int) -> Process:
        published = yield self.env.process(self._request(self.costs.publish, 1))
        self.publish_ms.append(published)
        self.store.put(name, self.costs.segment_bytes)
        self.env.process(self._expire(name))
        yield self.env.timeout(self.rng.expovariate(1 / self.plan.pause_ms))
        if name not in self.store.held:
            self.gone += 1
            return
        asked = self._request(self.costs.consume, self.plan.answer_tokens)
        consumed = yield self.env.process(asked)
        self.consume_ms.append(consumed)
        self.whole_ms.append(published + consumed)

    def _expire(self, name: int) -> Process:
        yield self.env.timeout(self.plan.ttl_ms)
        self.store.drop(name)


@dataclass(frozen=True)
class Kind:
    """A request that clients send over and over."""

    work_ms: float
    tokens: int
    """0: refused by the proxy."""
    weight: float = 1.0
    leaves_ms: tuple[float, float] | None = None
    """Between which the client hangs up, all times alike; None waits for the answer."""


def closed(
    costs: Costs, clients: int, kinds: Sequence[Kind], requests: int, *, proxied: bool = False
) -> tuple[float, float]:
    """Requests a second and median milliseconds, where ``clients`` each send the next of
    ``requests`` when one is answered, as ``bench_proxy`` and ``soak`` do."""
    env, rng = simpy.Environment(), random.Random(0)
    engine, proxy = Engine(env, costs), Station(env, lambda: costs.proxy)
    weights, spent = [k.weight for k in kinds], list[float]()

    def client() -> Process:
        for _ in range(requests):
            started = env.now
            (kind,) = rng.choices(kinds, weights)
            if proxied:
                yield env.process(proxy.serve())
            if kind.tokens:
                yield env.timeout(costs.front)
                done = engine.ask(kind.work_ms, kind.tokens)
                if kind.leaves_ms is None:
                    yield done
                else:
                    left_ms = rng.uniform(*kind.leaves_ms) - (env.now - started)
                    yield done | env.timeout(max(0.0, left_ms))
                    engine.abort(done)
            spent.append(env.now - started)

    for _ in range(clients):
        env.process(client())
    env.run()
    return len(spent) / env.now * 1e3, statistics.median(spent)
