"""Runs the canary worker on a schedule and hands its results to the leakage meter.

The worker is a process of its own at low priority: it fits an attack, which would hold up the
event loop, and it may be killed at any time. It gets its job, token included, through standard
input, because a command line is public. It says what it found edge by edge, one line each, so that
a leaking edge closes before the others are screened, and a worker that is late loses only the rest.
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

from lcguard.server.leakage.edge_state import State
from lcguard.server.leakage.meter import Change, EdgeLeakage, EdgeName, LeakageMeter

logger = logging.getLogger("lcguard.server")
FIRST_S, RETRY_S, LOOK_S = 5.0, 15.0, 5.0
_LINE_BYTES, _LOG_BYTES = 4 * 2**20, 64 * 2**10
"""Longest line of a worker's output, and how much of its log is kept."""
_LAST_WORDS_S = 5.0
"""For what a worker that ended has written and nobody has read yet."""


class WorkerError(RuntimeError):
    """A worker that did not end well. One line."""


class CanaryRunner:
    """One run at a time, the first soon after the start, then one every interval; edges that are
    new, or that a changed policy guards otherwise, are screened in between."""

    def __init__(
        self,
        command: Sequence[str],
        job: Callable[[], dict[str, Any]],
        meter: LeakageMeter,
        interval_s: float,
        timeout_s: float,
        on_change: Callable[[EdgeLeakage, State, State], Awaitable[None]],
        *,
        first_s: float = FIRST_S,
        retry_s: float = RETRY_S,
        look_s: float = LOOK_S,
    ) -> None:
        """
        Args:
            job: what the worker is to do; its ``edges`` name tenant, source and audience.
            on_change: called where an edge closed or opened, with its state before and after.
            first_s: wait before the first run.
            retry_s: wait after a run in which no edge could be screened; doubles up to the
                interval.
            look_s: how often to look for new edges.
        """
        self.command, self._job, self._meter = tuple(command), job, meter
        self.interval_s, self.timeout_s, self._on_change = interval_s, timeout_s, on_change
        self._first_s, self._retry_s, self._look_s = first_s, retry_s, look_s
        self._planned: set[str] = set()
        """Edges of the last run, with what guards them."""
        self._lock = asyncio.Lock()
        self.runs = 0
        """Runs that ended, well or not."""
        self.error = ""
        """Why the last run did not end well; empty after one that did."""

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        due_s, failures = clock() + self._first_s, 0
        while True:
            if await self._rest(due_s):
                # the others keep their time, unless the new ones have to be tried again before it
                if await self.run_now(new_only=True) is False:
                    due_s = min(due_s, clock() + self._retry_s)
                continue
            done = await self.run_now()
            if done:
                wait_s, failures = self.interval_s, 0
            else:  # the exponent is bounded, or the power would overflow after months
                wait_s = min(self.interval_s, self._retry_s * 2 ** min(failures, 20))
                failures += done is False
            due_s = clock() + wait_s

    async def _rest(self, until_s: float) -> bool:
        """Waits; true as soon as there is an edge that no run had."""
        clock = asyncio.get_running_loop().time
        while (left_s := until_s - clock()) > 0:
            await asyncio.sleep(min(left_s, self._look_s))
            if left_s > self._look_s and await asyncio.to_thread(self._any_new):
                return True
        return False

    def _any_new(self) -> bool:
        try:
            return any(_plan(edge) not in self._planned for edge in self._job()["edges"])
        except Exception:  # what is wrong with the job is for the next run to say
            return False

    async def run_now(self, new_only: bool = False) -> bool | None:
        """One run, after the one in progress if any. False where every edge that forbids anything
        failed, None where there is no edge.

        Args:
            new_only: without the edges that the last run had.

        Raises nothing but ``CancelledError``, on which the worker is killed.
        """
        async with self._lock:
            run = _Run(self._meter, self._on_change)
            self.error = ""
            try:
                await run.look()
                job = self._job()
                planned, before = {_plan(edge) for edge in job["edges"]}, self._planned
                if new_only:
                    job["edges"] = [e for e in job["edges"] if _plan(e) not in before]
                self._planned = planned
                # those that waited longest first: a worker that is late screens the rest next time
                job["edges"] = sorted(job["edges"], key=run.measured_at_s)
                run.left = dict.fromkeys(_name(edge) for edge in job["edges"])
                if not run.left:
                    return None
                await self._work(job, run)
            except WorkerError as error:
                self.error = str(error)
            except Exception as error:  # a schedule that ended by itself would measure nothing more
                logger.exception("canaries failed")
                self.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if self.error:
                logger.warning("canaries: %s", self.error)
            for edge in list(run.left):
                await run.fail(edge, self.error or "the worker left this edge out")
            self.runs += 1
            return run.screened > 0 or not (run.failed or self.error)

    async def _work(self, job: dict[str, Any], run: _Run) -> None:
        """Takes what a worker finds. Raises ``WorkerError``."""
        try:
            async with asyncio.timeout(self.timeout_s):
                code, err = await _worker(self.command, json.dumps(job).encode(), run.line)
        except TimeoutError:
            raise WorkerError(f"the worker took more than {self.timeout_s:g} s") from None
        except OSError as error:
            raise WorkerError(f"the worker cannot be started: {error}") from None
        if code:
            lines = err.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            token = str(job.get("token") or "")
            why = lines[-1].replace(token, "***") if token else lines[-1]
            raise WorkerError(f"the worker ended with {code}: {why.strip()[:200]}")
        if not run.lines:
            raise WorkerError("the worker ended well and said nothing that is a result")


class _Run:
    """What one worker has said so far."""

    def __init__(
        self, meter: LeakageMeter, on_change: Callable[[EdgeLeakage, State, State], Awaitable[None]]
    ) -> None:
        self._meter, self._on_change = meter, on_change
        self._measured: dict[EdgeName, float] = {}
        self.left: dict[EdgeName, None] = {}
        """Edges without a result."""
        self.lines = self.screened = self.failed = 0

    async def look(self) -> None:
        """Finds out when each edge was screened last."""
        edges = await asyncio.to_thread(self._meter.snapshot)
        self._measured = {e.name: e.measured_at_s or 0.0 for e in edges}

    def measured_at_s(self, edge: Mapping[str, Any]) -> float:
        """Unix time of the edge's last screening; 0 for none."""
        return self._measured.get(_name(edge), 0.0)

    async def line(self, text: bytes) -> None:
        """A line of output: ``{"result": {...}}``, ``{"results": [...]}``, or a library's words."""
        try:
            said = json.loads(text)
            results = said["results"] if "results" in said else [said["result"]]
            names = [_name(r) for r in results]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        self.lines += 1
        for name, result in zip(names, results, strict=True):
            if name in self.left:  # the last line repeats them all
                del self.left[name]
                await self._take(name, result)

    async def fail(self, edge: EdgeName, message: str) -> None:
        """An edge that could not be screened."""
        self.failed += 1
        await asyncio.to_thread(self._meter.record_error, edge, message)

    async def _take(self, edge: EdgeName, result: Mapping[str, Any]) -> None:
        if "error" in result:
            await self.fail(edge, str(result["error"]))
            return
        try:
            change = await asyncio.to_thread(self._meter.record, result)
        except ValueError as error:
            await self.fail(edge, str(error))
            return
        self.screened += "skipped" not in result
        await self._tell(change)

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


async def _worker(
    command: Sequence[str], given: bytes, line: Callable[[bytes], Awaitable[None]]
) -> tuple[int, bytes]:
    """Exit code and the end of the log. Leaves no process behind, whatever happens."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=_LINE_BYTES,
    )
    stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
    assert stdin is not None
    assert stdout is not None
    assert stderr is not None
    out, err = asyncio.ensure_future(_lines(stdout, line)), asyncio.ensure_future(_end(stderr))
    try:
        with suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(given)
            await stdin.drain()
        stdin.close()
        code = await _ended(process)
        _kill_group(process.pid)  # what it left behind holds its outputs open
        await asyncio.wait((out, err), timeout=_LAST_WORDS_S)
        if out.done():
            out.result()  # raises what taking a result raised
        return code, err.result() if err.done() else b""
    finally:
        _kill_group(process.pid)
        await _ended(process)
        for reader in (out, err):
            reader.cancel()
        await asyncio.gather(out, err, return_exceptions=True)
        # asyncio has no public way to let go of pipes that a process beyond the group holds
        process._transport.close()  # type: ignore[attr-defined]


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Exit code. ``process.wait()`` would wait for whoever holds the pipes as well."""
    while process.returncode is None:
        await asyncio.sleep(0.05)
    return process.returncode


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def _lines(stream: asyncio.StreamReader, line: Callable[[bytes], Awaitable[None]]) -> None:
    while True:
        try:
            text = await stream.readline()
        except ValueError:  # longer than the limit, and dropped
            continue
        if not text:
            return
        await line(text)


async def _end(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream, read to its end."""
    kept = b""
    while chunk := await stream.read(2**16):
        kept = (kept + chunk)[-_LOG_BYTES:]
    return kept


def _plan(edge: Mapping[str, Any]) -> str:
    """An edge with all that is to be screened on it."""
    return json.dumps(edge, sort_keys=True)


def _name(edge: Mapping[str, Any]) -> EdgeName:
    return str(edge["tenant"]), str(edge["source"]), str(edge["audience"])
