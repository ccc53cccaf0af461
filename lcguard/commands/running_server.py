"""Whether a proxy listens at an address, and what it says of itself."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException

_ASK_S = 5.0
_MOST_BYTES = 2**20
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""What listens on all addresses is asked on loopback."""


def readiness_of(host: str, port: int) -> dict[str, object] | None:
    """What ``/readyz`` answers; None where nobody does, or something else than a proxy."""
    if not port:
        return None
    local = _EVERYWHERE.get(host, host)
    local = f"[{local}]" if ":" in local else local
    try:
        found = json.loads(_answer(f"http://{local}:{port}/readyz"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and "ready" in found else None


def _answer(url: str) -> bytes:
    """The answer's body, whatever its status; empty where nobody answers in HTTP."""
    # past a proxy that the environment names: the question is about this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ASK_S) as answer:
            return bytes(answer.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            return error.read(_MOST_BYTES)
    except (OSError, HTTPException):
        return b""
