"""Work beside the event loop: told by the order of events, never by how long something takes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lcguard.server.detection.cpu_worker import CpuWorker
from lcguard.server.errors import ProxyError


def test_the_loop_goes_on_and_nobody_waits_past_the_deadline() -> None:
    go, begun = threading.Event(), list[str]()

    def hangs() -> str:
        begun.append("hangs")
        go.wait()
        return "late"

    async def run() -> None:
        bench = CpuWorker(0.05, "a search")
        with pytest.raises(ProxyError, match=r"a search took longer than 0\.05 s") as late:
            await bench.run(hangs)
        assert (late.value.status, late.value.code) == (503, "busy")
        with pytest.raises(ProxyError):  # in the line behind it
            await bench.run(begun.append, "never")
        go.set()
        patient = CpuWorker(600, "a search")
        assert await patient.run(lambda: 7) == 7
        with pytest.raises(ValueError, match="its own"):
            await patient.run(_fails)
        bench.close()
        patient.close()

    asyncio.run(run())
    assert begun == ["hangs"]


def _fails() -> None:
    raise ValueError("its own")


def test_what_nobody_waits_for_is_not_begun() -> None:
    go, events = threading.Event(), list[str]()

    async def run() -> None:
        bench = CpuWorker(600, "a search")
        first = asyncio.ensure_future(bench.run(lambda: go.wait() and events.append("first")))
        await asyncio.sleep(0)
        left = asyncio.ensure_future(bench.run(events.append, "left"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        last = asyncio.ensure_future(bench.run(events.append, "last"))
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(first, last)
        bench.close()

    asyncio.run(run())
    assert events == ["first", "last"]
