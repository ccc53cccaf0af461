"""Clients that do not read: real sockets, and a real server of uvicorn's in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from lcguard.server.gateway.timed_http import TimedHttp

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def served(app: Any, use: Callable[[int], Awaitable[None]], write_s: float) -> None:
    """Runs ``use`` on the port of a server that cuts after ``write_s``."""

    async def run() -> None:
        config = uvicorn.Config(
            app,
            port=0,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=1,
            http=TimedHttp.with_timeouts(10.0, write_s),
            timeout_keep_alive=1,
        )
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            await use(server.servers[0].sockets[0].getsockname()[1])
        finally:
            server.should_exit = True
            await task

    asyncio.run(asyncio.wait_for(run(), 120))


def silent(port: int) -> socket.socket:
    """A client that has asked and never reads, its buffer as small as it gets."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    client.sendall(REQUEST)
    return client


@pytest.mark.parametrize("write_s", [0.2, 1.0])
def test_an_endless_answer_to_a_client_that_does_not_read_is_cut(write_s: float) -> None:
    """The application sees it by the disconnect that it waits for; nothing else ends it."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            told.append("disconnect")

        waits = asyncio.ensure_future(gone())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not waits.done():
            body = {"type": "http.response.body", "body": b"x" * 65536, "more_body": True}
            await send(body)
            await asyncio.sleep(0)

    async def use(port: int) -> None:
        with silent(port):
            while not told:
                await asyncio.sleep(0.01)

    served(app, use, write_s)
    assert told == ["disconnect"]


def test_a_client_that_reads_slowly_is_not_cut() -> None:
    """It takes its answer bit by bit; the server's buffer is full again and again."""
    size = 6 * 2**20

    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(size // 65536):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < size:
            got += len(await reader.read(65536))
            await asyncio.sleep(0)
        writer.close()

    served(app, use, 60.0)


def test_what_is_left_of_a_finished_answer_does_not_keep_a_connection() -> None:
    """The answer is written to its end, the client takes none of it and stays connected."""
    lost = asyncio.Event()

    class Watched(TimedHttp):
        write_timeout_s = 0.2

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()
            super().connection_lost(exc)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        n = 8 * 2**20
        head = [(b"content-length", str(n).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"x" * n})

    async def run() -> None:
        config = uvicorn.Config(
            app,
            port=0,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=1,
            http=Watched,
            timeout_keep_alive=1,
        )
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        with silent(server.servers[0].sockets[0].getsockname()[1]):
            await lost.wait()
        server.should_exit = True
        await task

    asyncio.run(asyncio.wait_for(run(), 120))
    assert lost.is_set()
