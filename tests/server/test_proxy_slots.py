"""No client and no store keeps the others waiting: ``lcguard serve`` before an upstream that never
ends an answer. Everything here is told from the order of events, on real sockets and processes."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcguard.commands.live_servers import Running, Site
from tests.server.proxy_client import Client, asked, until
from tests.store.places import running_redis

WAIT_S = 90.0
EVENT = {"id": "x", "choices": [{"index": 0, "text": "x" * 4000, "finish_reason": None}]}
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: "


@dataclass
class Endless:
    """An upstream whose streams never end."""

    port: int = 0
    seen: list[str] = field(default_factory=list)
    """Streams and answers, as they begin and as the proxy leaves them."""
    heads: list[dict[str, str]] = field(default_factory=list)
    """Of the requests, names in lower case."""

    async def accept(self, reader: Any, writer: Any) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            found = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head)}
            size = int(found.get("content-length", 0))
            body = json.loads(await reader.readexactly(size) or b"{}")
            self.heads.append(found)
            if not body.get("stream"):
                self.seen.append("answer")
                data = json.dumps({"choices": [], "usage": {"total_tokens": 2}}).encode()
                writer.write(HEAD + b"application/json\r\n\r\n" + data)
                await writer.drain()
                return
            self.seen.append("stream")
            writer.write(HEAD + b"text/event-stream\r\n\r\n")
            try:
                while True:
                    writer.write(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
                    await writer.drain()
                    await asyncio.sleep(0.001)
            finally:
                self.seen.append("left")
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextmanager
def endless() -> Iterator[Endless]:
    upstream, started = Endless(), threading.Event()
    stop: list[Any] = []

    async def serve() -> None:
        server = await asyncio.start_server(upstream.accept, "127.0.0.1", 0)
        upstream.port = server.sockets[0].getsockname()[1]
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(end.set))
        started.set()
        await end.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(WAIT_S)
    yield upstream
    stop[0]()
    thread.join(WAIT_S)


@dataclass
class Front:
    upstream: Endless
    running: Running
    one: Client
    other: Client

    def silent(self) -> socket.socket:
        """A stream of ``one`` that nobody reads."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(self.running.url.rpartition(":")[2])))
        data = json.dumps(asked("x", stream=True)).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self.one.key}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        client.sendall(head.encode() + data)
        return client


@contextmanager
def front_of(folder: Path, **settings: Any) -> Iterator[Front]:
    site = Site(folder)
    keys = [site.key("one"), site.key("other")]
    with endless() as upstream:
        there = Running(None, f"http://127.0.0.1:{upstream.port}", folder / "none", "key")  # type: ignore[arg-type]
        with site.proxy(there, ready=False, **settings) as running:
            until(lambda: running.get("/livez")[0] == 200, WAIT_S, "the proxy is there")
            yield Front(upstream, running, *(Client(running.url, key) for key in keys))


def test_a_client_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    """There is one place, and the other's request waits in the line for it."""
    limits = {"max_concurrency": 1, "write_timeout_s": 1, "queue_timeout_s": 600}
    with front_of(tmp_path, limits=limits) as front, front.silent():
        until(lambda: "stream" in front.upstream.seen, WAIT_S, "the stream runs")
        assert front.other.ask("x").status == 200
        began = front.upstream.seen.index("stream")
        assert front.upstream.seen[began:].index("answer") > 0


def test_a_reading_client_has_its_place_until_total_timeout_s(tmp_path: Path) -> None:
    limits, upstream = {"max_concurrency": 1, "queue_timeout_s": 600}, {"total_timeout_s": 8}
    with front_of(tmp_path, limits=limits, upstream=upstream) as front:
        seen: list[Any] = []
        with front.one.stream("x") as events:
            for event in events:
                seen.append(event)
        assert seen[-1]["error"]["code"] == "upstream_timeout"
        assert len(seen) > 1
        assert front.other.ask("x").status == 200


def test_a_key_has_a_limit_without_saying_one(tmp_path: Path) -> None:
    with front_of(tmp_path, limits={"key_concurrency": 2}) as front, ExitStack() as stack:
        for _ in range(2):
            next(stack.enter_context(front.one.stream("x")))
        refused = front.one.ask("x")
        assert refused.status == 429
        assert "2 requests running already" in refused.reason
        assert front.other.ask("x").status == 200


def test_the_line_before_vllm_has_an_end(tmp_path: Path) -> None:
    """One place, and one that waits for it: the third is refused, told by the order of events."""
    limits = {"max_concurrency": 1, "max_queue": 1, "queue_timeout_s": 600}
    statuses: list[int] = []
    with front_of(tmp_path, metrics_auth=False, limits=limits) as front:
        waiting = threading.Thread(target=lambda: statuses.append(front.other.ask("x").status))

        def queued() -> bool:
            return b"\nlcguard_queued 1.0\n" in front.running.get("/metrics")[1]

        with front.one.stream("x") as events:
            next(events)
            waiting.start()
            until(queued, WAIT_S, "a request waits")
            refused = front.one.ask("x")
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "1 requests are running and 1 waiting" in refused.reason
            assert statuses == []
        waiting.join(WAIT_S)
        assert statuses == [200]  # the stream was left: its place is free again


def test_who_waits_too_long_for_a_place_is_refused(tmp_path: Path) -> None:
    limits = {"max_concurrency": 1, "max_queue": 1, "queue_timeout_s": 0.5}
    with front_of(tmp_path, limits=limits) as front, front.one.stream("x") as events:
        next(events)
        refused = front.other.ask("x")
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "no place came free within 0.5 s" in refused.reason


def test_a_stopped_store_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    """More handoffs wait for it than there are threads, and none of them has an end in sight."""
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as (port, process):
        store = {"store": f"redis://127.0.0.1:{port}/0", "store_timeout_s": 600}
        with front_of(tmp_path, **store) as front:
            ended: list[int] = []
            waiting = [
                threading.Thread(
                    target=lambda i=i: ended.append(front.one.consume(f"{'x' * 30}{i:02}").status)
                )
                for i in range(20)
            ]
            process.send_signal(signal.SIGSTOP)
            try:
                for thread in waiting:
                    thread.start()
                for _ in range(3):
                    assert front.other.ask("x").status == 200
                    assert front.other.get("/lcguard/v1/segments").status == 200
                assert ended == []
            finally:
                process.send_signal(signal.SIGCONT)
            for thread in waiting:
                thread.join(WAIT_S)
            assert ended == [404] * 20


def test_headers_that_are_passed_on(tmp_path: Path) -> None:
    """What the engine is told is harmless, whatever a client sends."""
    good = {
        "x-request-id": "run-7.b_2",
        "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01",
        "tracestate": "vendor=1",
    }
    bad = {
        "x-request-id": ["", "two words", "x" * 65, "a/b", "caf\u00e9", "a\tb"],
        "traceparent": ["00-1-2-3", f"00-{'AB' * 16}-{'cd' * 8}-01"],
        "tracestate": ["x" * 513, "caf\u00e9"],
    }
    with front_of(tmp_path) as front:

        def passed(headers: dict[str, str]) -> dict[str, str]:
            body = asked("x")
            answer = front.one.request("POST", "/v1/completions", body, headers)
            assert answer.status == 200
            assert answer.headers["x-request-id"].isascii()
            # the proxy looks at the engine's health meanwhile, by GET
            posted = [h for h in front.upstream.heads if any(k.startswith("post ") for k in h)]
            return {k: v for k, v in posted[-1].items() if k in good}

        assert passed(good) == good
        for name, values in bad.items():
            for value in values:
                assert passed({name: value}) == {}, (name, value)
