"""Reads a request's body: bounded in size and in time."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive

from lcguard.server.errors import ProxyError


class ClientGone(Exception):
    """The client hung up: nobody is there to be answered."""


async def read_body(
    receive: Receive, headers: Mapping[str, str], max_bytes: int, timeout_s: float
) -> bytes:
    """The whole body.

    Raises:
        ProxyError: 413 above ``max_bytes``, 408 where it takes longer than ``timeout_s``.
        ClientGone: hung up before its end.
    """
    said = headers.get("content-length", "")
    if said.isdigit() and int(said) > max_bytes:
        raise _too_large(max_bytes)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                size += len(piece)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ProxyError(
            408, f"the body did not arrive within {timeout_s:g} s", code="slow_body"
        ) from None


def parse_object(raw: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    """A JSON object. Raises ``ProxyError`` (400, 415)."""
    kind = headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ProxyError(415, f"content-type {kind[:60]!r}: send application/json", code="media")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ProxyError(415, "content-encoding: send the body uncompressed", code="media")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ProxyError(
            400, f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8", code="bad_json"
        ) from None
    try:
        data = json.loads(
            text, parse_constant=_no_constant, parse_int=_integer, parse_float=_number
        )
    except (ValueError, RecursionError) as error:
        where = f"column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise ProxyError(400, f"the body is not JSON ({where})", code="bad_json") from None
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(data)
    if not isinstance(data, dict):
        raise ProxyError(
            400, f"the body is a {type(data).__name__}: send an object", code="bad_json"
        )
    return data


def _check_surrogates(data: Any) -> None:
    """Half a character, which JSON can escape and no text can hold."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ProxyError(
            400,
            "the body holds half a surrogate pair (\\ud800 to \\udfff alone): send whole "
            "characters",
            code="bad_json",
        ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _integer(digits: str) -> int:
    # the engine's counters have 64 bits; it would answer 500 to a wider one
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ProxyError(400, f"{_short(digits)} does not fit 64 bits: send less", code="bad_json")
    return value


def _number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ProxyError(400, f"{_short(digits)} is not finite: send less", code="bad_json")
    return value


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:21]}..."


def _too_large(max_bytes: int) -> ProxyError:
    return ProxyError(413, f"the body has more than {max_bytes} bytes", code="too_large")
