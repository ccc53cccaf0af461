"""Runs the canary worker on a schedule and hands its results to the leakage meter.

The worker is a process of its own at low priority: it fits an attack, which would hold up the
event loop, and it may be killed at any time. It gets its job, token included, through standard
input, because a command line is public.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lcguard.server.leakage import Change, EdgeLeakage, EdgeName, LeakageMeter
from lcguard.server.leakage_state import State

logger = logging.getLogger("lcguard.server")
FIRST_S, RETRY_S = 5.0, 15.0
_MAX_BYTES = 16 * 2**20
"""Most that is read of a worker's output."""


class WorkerError(RuntimeError):
    """A worker that gave no result. One line."""


class CanaryRunner:
    """One run at a time, the first soon after the start, then one every interval."""

    def __init__(
        self, command: Sequence[str], job: Callable[[], dict[str, Any]], meter: LeakageMeter,
        interval_s: float, timeout_s: float,
        on_change: Callable[[EdgeLeakage, State, State], Awaitable[None]], *,
        first_s: float = FIRST_S, retry_s: float = RETRY_S,
    ) -> None:  # fmt: skip
        """
        Args:
            job: what the worker is to do; its ``edges`` name tenant, source and audience.
            on_change: called where an edge closed or opened, with its state before and after.
            first_s: wait before the first run.
            retry_s: wait after a run in which no edge could be screened; doubles up to the
                interval.
        """
        self.command, self._job, self._meter = tuple(command), job, meter
        self.interval_s, self.timeout_s, self._on_change = interval_s, timeout_s, on_change
        self._first_s, self._retry_s = first_s, retry_s
        self._lock = asyncio.Lock()
        self.runs = 0
        """Runs that ended, well or not."""
        self.error = ""
        """Why the last run gave nothing; empty after one that did."""

    async def run(self) -> None:
        """Until cancelled."""
        wait_s, failures = self._first_s, 0
        while True:
            await asyncio.sleep(wait_s)
            done = await self.run_now()
            if done:
                wait_s, failures = self.interval_s, 0
            else:  # the exponent is bounded, or the power would overflow after months
                wait_s = min(self.interval_s, self._retry_s * 2 ** min(failures, 20))
                failures += done is False

    async def run_now(self) -> bool | None:
        """One run, after the one in progress if any. False where every edge that forbids anything
        failed, None where there is no edge.

        Raises nothing but ``CancelledError``, on which the worker is killed.
        """
        async with self._lock:
            edges: list[EdgeName] = []
            self.error, done = "", False
            try:
                job = self._job()
                edges = [_name(edge) for edge in job["edges"]]
                if not edges:
                    return None
                done = await self._take(edges, await self._results(job))
            except WorkerError as error:
                self.error = str(error)
            except Exception as error:  # a schedule that ended by itself would measure nothing more
                logger.exception("canaries failed")
                self.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if self.error:
                logger.warning("canaries: %s", self.error)
                for edge in edges:
                    await asyncio.to_thread(self._meter.record_error, edge, self.error)
            self.runs += 1
            return done

    async def _take(self, edges: list[EdgeName], results: list[Any]) -> bool:
        """Records all results; edges without one get an error."""
        left, failed, screened = dict.fromkeys(edges), False, False
        for result in results:
            edge = _name(result)
            if edge not in left:
                logger.warning("canaries: a result for %s, which was not asked for", edge)
                continue
            del left[edge]
            if "error" in result:
                await asyncio.to_thread(self._meter.record_error, edge, str(result["error"]))
                failed = True
                continue
            try:
                change = await asyncio.to_thread(self._meter.record, result)
            except ValueError as error:
                await asyncio.to_thread(self._meter.record_error, edge, str(error))
                failed = True
                continue
            screened |= "skipped" not in result
            await self._tell(change)
        for edge in left:
            await asyncio.to_thread(self._meter.record_error, edge, "the worker left this edge out")
        return screened or not (failed or left)

    async def _tell(self, change: Change) -> None:
        if change.old == change.new:
            return
        logger.warning(
            "edge %s is %s: %s", "/".join(change.edge.name), change.new, change.edge.reason
        )
        try:
            await self._on_change(*change)
        except Exception:  # the edge is what the meter says, whoever hears of it
            logger.exception("nobody could be told that an edge is %s", change.new)

    async def _results(self, job: dict[str, Any]) -> list[Any]:
        """What the worker found. Raises ``WorkerError``."""
        try:
            async with asyncio.timeout(self.timeout_s):
                code, out, err = await self._work(json.dumps(job).encode())
        except TimeoutError:
            raise WorkerError(f"the worker took more than {self.timeout_s:g} s") from None
        except OSError as error:
            raise WorkerError(f"the worker cannot be started: {error}") from None
        if code:
            token = str(job.get("token") or "")
            why = _last_line(err)
            why = why.replace(token, "***") if token else why
            raise WorkerError(f"the worker ended with {code}: {why[:200] or 'it said nothing'}")
        try:
            found = json.loads(_last_line(out))["results"]
            if not isinstance(found, list):
                raise TypeError
            [_name(r) for r in found]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise WorkerError("the last line of the worker's output is no result") from None
        return found

    async def _work(self, given: bytes) -> tuple[int, bytes, bytes]:
        """Exit code, and the ends of both outputs. Leaves no process behind, whatever happens."""
        process = await asyncio.create_subprocess_exec(
            *self.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        out, err = (asyncio.ensure_future(_tail(s)) for s in (process.stdout, process.stderr))
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(given)
                await process.stdin.drain()
            process.stdin.close()
            code = await process.wait()
            _kill_group(process.pid)  # what it left behind would hold its outputs open
            return code, await out, await err
        finally:
            _kill_group(process.pid)
            await process.wait()
            for reader in (out, err):
                reader.cancel()
            await asyncio.gather(out, err, return_exceptions=True)
            # asyncio has no public way to let go of pipes that a stranger still holds
            process._transport.close()  # type: ignore[attr-defined]


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def _tail(stream: asyncio.StreamReader | None) -> bytes:
    """The last bytes of a stream, read to its end."""
    assert stream is not None
    kept = b""
    while chunk := await stream.read(65536):
        kept = (kept + chunk)[-_MAX_BYTES:]
    return kept


def _last_line(data: bytes) -> str:
    lines = data.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _name(edge: Mapping[str, Any]) -> EdgeName:
    return str(edge["tenant"]), str(edge["source"]), str(edge["audience"])
