"""Requests to a proxy byte by byte, without a client."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from tests.server.drill import (
    WAIT_S,
    Drill,
)


def send_whole(drill: Drill, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not waited for."""
    data = json.dumps(body).encode()
    made = connect(drill)
    made.sendall(head(drill, len(data)) + data)
    return made


def connect(drill: Drill) -> socket.socket:
    parts = urlsplit(drill.proxy.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S)


def head(drill: Drill, n_bytes: int, path: str = "/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {drill.publisher.key}\r\nContent-Length: {n_bytes}\r\n\r\n"
    ).encode()


def drip(connection: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Sends a byte a second until the other side has had enough; its answer, and seconds."""
    started = time.monotonic()
    connection.settimeout(1.0)
    got = b""
    for byte in data:
        assert time.monotonic() - started < WAIT_S, "the proxy waits for ever"
        try:
            connection.send(bytes([byte]))
            piece = connection.recv(65536)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            break
        got += piece
        if not piece:
            break
    return got, time.monotonic() - started
