"""What tests of options share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from lcguard.commands.live_servers import UPSTREAM_KEY, Site
from tests.server.proxy import (
    Front,
    error,
    wait_for,
)

FOREVER = 2000
"""Tokens; seconds long."""


def with_key(site: Site, name: str, key: str) -> Site:
    """The same site under an environment with the engine's key."""
    other = Site(site.folder)
    other.environment = {k: v for k, v in site.environment.items() if k != UPSTREAM_KEY}
    other.environment[name] = key
    return other


def first_reason(front: Front) -> str:
    """Why a proxy that will not become ready is not."""

    def look() -> str:
        with_reason = [c["detail"] for c in front.ready()["checks"].values() if not c["ok"]]
        return with_reason[0] if with_reason and "not checked" not in with_reason[0] else ""

    wait_for(lambda: front.running.get("/livez")[0] == 200)
    return str(wait_for(look))


@contextmanager
def stream(front: Front, who: dict[str, str], n: int = FOREVER) -> Iterator[httpx.Response]:
    """A long stream that has begun."""
    body = {"model": "nano", "prompt": "Once", "max_tokens": n, "ignore_eos": True, "stream": True}
    with front.http.stream("POST", "/v1/completions", json=body, headers=who) as answer:
        assert answer.status_code == 200
        yield answer


def error_of(answer: httpx.Response) -> tuple[int, str] | None:
    return None if answer.status_code == 200 else error(answer)
