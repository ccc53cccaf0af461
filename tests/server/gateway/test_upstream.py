"""Calls to an upstream that misbehaves: small real servers on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.settings import UpstreamSettings

OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"a": 12}'
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Behaviour = Callable[["Connection"], Awaitable[None]]


class Connection:
    """One accepted connection and the request that came on it."""

    def __init__(self, n: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n, self.reader, self.writer = n, reader, writer
        self.head, self.body = "", b""

    async def read(self) -> None:
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        sizes = [x for x in self.head.lower().splitlines() if x.startswith("content-length:")]
        if sizes:
            self.body = await self.reader.readexactly(int(sizes[0].partition(":")[2]))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        self.writer.transport.abort()


def ask(
    behave: Behaviour, use: Callable[[Upstream], Awaitable[Any]], **settings: Any
) -> tuple[Any, list[Connection]]:
    """What ``use`` returns or raises as ``ProxyError``, and the connections that were made."""

    async def run() -> tuple[Any, list[Connection]]:
        seen: list[Connection] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(len(seen), reader, writer)
            seen.append(connection)
            # cancelled where the server still sleeps when the test is over
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await connection.read()
                await behave(connection)
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(UpstreamSettings(**settings), f"http://127.0.0.1:{port}/", "secret")
        await upstream.start()
        try:
            return await use(upstream), seen
        except ProxyError as error:
            return error, seen
        finally:
            await upstream.close()
            server.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


async def question(upstream: Upstream) -> Any:
    return await upstream.ask("/v1/completions", {"prompt": "hello"})


async def answers(connection: Connection) -> None:
    await connection.send(OK)


async def silence(connection: Connection) -> None:
    await asyncio.Event().wait()


async def resets(connection: Connection) -> None:
    connection.reset()


def test_the_question_and_the_engines_key_arrive() -> None:
    answer, (connection,) = ask(answers, question)
    assert answer == {"a": 12}
    assert connection.head.startswith("POST /v1/completions HTTP/1.1")
    assert "Authorization: Bearer secret" in connection.head
    assert json.loads(connection.body) == {"prompt": "hello"}


def test_headers_of_the_client_never_replace_the_engines_key() -> None:
    async def use(upstream: Upstream) -> Any:
        answer = await upstream.post("/x", b"{}", {"Authorization": "Bearer client", "b": "1"})
        answer.close()

    _, (connection,) = ask(answers, use)
    assert "Bearer secret" in connection.head
    assert "Bearer client" not in connection.head
    assert "b: 1" in connection.head


def test_a_proxy_named_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(answers, question)[0] == {"a": 12}


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_dropped_connection_is_tried_again_as_often_as_the_option_says(retries: int) -> None:
    error, seen = ask(resets, question, retries=retries)
    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert len(seen) == retries + 1


def test_the_retry_may_succeed() -> None:
    async def second_time(connection: Connection) -> None:
        await (resets if connection.n == 0 else answers)(connection)

    answer, seen = ask(second_time, question, retries=1)
    assert answer == {"a": 12}
    assert seen[0].body == seen[1].body


def test_after_a_byte_of_an_answer_nothing_is_tried_again() -> None:
    async def cut(connection: Connection) -> None:
        await connection.send(OK[:-3])
        connection.reset()

    error, seen = ask(cut, question, retries=3)
    assert (error.status, error.code) == (502, "upstream_unreachable")
    assert len(seen) == 1


def test_a_half_answered_head_is_tried_again_or_said() -> None:
    async def cut(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-")

    error, _ = ask(cut, question, retries=0)
    assert (error.status, error.code) == (502, "upstream_unreachable")


def test_nobody_listens() -> None:
    async def run() -> ProxyError:
        upstream = Upstream(UpstreamSettings(retries=1), "http://127.0.0.1:1", "")
        await upstream.start()
        try:
            with pytest.raises(ProxyError) as caught:
                await upstream.get("/health")
            return caught.value
        finally:
            await upstream.close()

    error = asyncio.run(run())
    assert (error.status, error.code, error.retry_after_s) == (502, "upstream_unreachable", 2)


def test_a_server_that_does_not_take_connections_runs_into_connect_timeout_s() -> None:
    """A full accept queue leaves further connections unanswered."""

    async def run() -> tuple[ProxyError, float]:
        import socket

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            port = listener.getsockname()[1]
            fillers = []
            try:
                for _ in range(4):
                    filler = socket.socket()
                    filler.setblocking(False)
                    with suppress(BlockingIOError):
                        filler.connect(("127.0.0.1", port))
                    fillers.append(filler)
                await asyncio.sleep(0.2)
                settings = UpstreamSettings(connect_timeout_s=0.3, retries=0)
                upstream = Upstream(settings, f"http://127.0.0.1:{port}", "")
                await upstream.start()
                try:
                    with pytest.raises(ProxyError) as caught:
                        await question(upstream)
                finally:
                    await upstream.close()
                return caught.value
            finally:
                for filler in fillers:
                    filler.close()

    error = asyncio.run(asyncio.wait_for(run(), 120))
    assert error.status == 504
    assert "0.3 s" in error.message


@pytest.mark.parametrize("option", ["read_timeout_s", "total_timeout_s"])
def test_silence_before_the_head_ends_with_504(option: str) -> None:
    error, seen = ask(silence, question, **{option: 0.3}, retries=3)
    assert (error.status, error.code) == (504, "upstream_timeout")
    assert "/v1/completions within 0.3 s" in error.message
    assert len(seen) < 2, "vLLM may be computing: it is not asked twice"


def test_silence_in_the_middle_of_an_answer_runs_into_read_timeout_s() -> None:
    async def stops(connection: Connection) -> None:
        await connection.send(HEAD + b"1\r\nx\r\n")
        await silence(connection)

    error, _ = ask(stops, question, read_timeout_s=0.3)
    assert (error.status, error.code) == (504, "upstream_timeout")


def test_a_trickle_is_no_silence_and_ends_at_total_timeout_s() -> None:
    async def trickles(connection: Connection) -> None:
        await connection.send(HEAD)
        while True:
            await connection.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.05)

    error, _ = ask(trickles, question, read_timeout_s=60, total_timeout_s=0.6)
    assert (error.status, error.code) == (504, "upstream_timeout")


def test_a_slow_answer_within_the_limits_is_whole() -> None:
    async def slow(connection: Connection) -> None:
        for byte in OK:
            await connection.send(bytes([byte]))
            await asyncio.sleep(0.002)

    assert ask(slow, question, read_timeout_s=60)[0] == {"a": 12}


def test_get_has_a_limit_of_its_own() -> None:
    error, _ = ask(silence, lambda upstream: upstream.get("/health", timeout_s=0.2))
    assert (error.status, error.code) == (504, "upstream_timeout")


@pytest.mark.parametrize(("status", "said"), [(400, 400), (404, 404), (500, 502), (503, 502)])
def test_an_answer_of_another_status_is_an_error_with_vllms_words(status: int, said: int) -> None:
    async def refuses(connection: Connection) -> None:
        body = json.dumps({"error": {"message": "a\nreason"}}).encode()
        await connection.send(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )

    error, _ = ask(refuses, question)
    assert error.status == said
    assert "a reason" in error.whole
    assert "a reason" not in error.message  # which goes to the audit


def test_an_answer_that_is_no_json_is_an_error_of_the_upstream() -> None:
    async def rambles(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    error, _ = ask(rambles, question)
    assert isinstance(error, ProxyError)
    assert error.status == 502


def test_a_redirect_is_not_followed() -> None:
    async def redirects(connection: Connection) -> None:
        await connection.send(
            b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
        )

    async def use(upstream: Upstream) -> int:
        answer = await upstream.post("/x", b"{}", {})
        async with answer:
            return answer.status

    status, seen = ask(redirects, use)
    assert status == 307
    assert len(seen) == 1


def test_closing_an_answer_makes_the_upstream_see_the_end() -> None:
    hung_up = asyncio.Event()

    async def streams(connection: Connection) -> None:
        await connection.send(HEAD + b"1\r\nx\r\n")
        assert await connection.reader.read() == b""
        hung_up.set()

    async def use(upstream: Upstream) -> bool:
        answer = await upstream.post("/x", b"{}", {})
        assert await answer.content.readany() == b"x"
        answer.close()
        await asyncio.wait_for(hung_up.wait(), 60)
        return hung_up.is_set()

    assert ask(streams, use)[0] is True


def test_before_start_there_is_no_connection() -> None:
    with pytest.raises(ProxyError) as caught:
        asyncio.run(Upstream(UpstreamSettings(), "http://127.0.0.1:1", "").get("/health"))
    assert (caught.value.status, caught.value.code) == (503, "starting")
