"""Revocations end what reads a segment, once each."""

from __future__ import annotations

import asyncio

import pytest

from lcguard.server.authorization.active_reads import ActiveReads
from lcguard.server.errors import ProxyError


def test_what_ends_already_is_not_broken_off_by_a_second_look() -> None:
    """The request at this proxy and the look at the ledger may both see one revocation."""
    reads, written = ActiveReads(), list[str]()

    async def write_down() -> None:
        await asyncio.sleep(0)
        assert reads.end(["a"]) == 1, "it reads the segment still"
        await asyncio.sleep(0)
        written.append("row")

    async def request() -> None:
        with reads.reading(["a", "b"]):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await write_down()
                raise

    async def play() -> None:
        task = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        assert reads.handles() == {"a", "b"}
        assert (reads.end(["b"]), reads.end(["unread"])) == (1, 0)
        with pytest.raises(ProxyError, match="was revoked"):
            await task
        assert written == ["row"]
        assert not reads.handles()

    asyncio.run(play())
