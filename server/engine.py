"""The vLLM that ``lcguard serve`` starts: on loopback, with the connector and a key of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.model_files import AS_TRANSFORMERS
from lcguard.private_files import private_log
from lcguard.server.settings import EngineSettings

MIDDLEWARE = "lcguard.vllm.authentication.AuthenticationMiddleware"
_STOP_S = 20.0
_BACKOFF_S = (1.0, 5.0, 15.0)
_LOOK_S = 0.5
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
CPU_CACHE_GIB = "1"
"""Where the variable is not set: vLLM's own default is several. Read by its CPU build alone."""
_USAGE = 2
"""Exit code for arguments that cannot be read."""


@dataclass(frozen=True)
class EnginePlan:
    """What the engine serves."""

    settings: EngineSettings
    model: str
    """Folder or hub repository."""
    name: str
    """As clients call it."""
    policy: str
    """Path, or empty for the policy that forbids everything, as while there is no such file."""
    store: str
    store_max_bytes: int | None
    log: Path
    store_timeout_s: float = 10.0

    def command(self, port: int) -> list[str]:
        """Without secrets: a command line is public."""
        extra = {
            "store": self.store,
            "proxy_only": True,
            "guards": self.settings.guards,
            "store_timeout_s": self.store_timeout_s,
            **({"policy": self.policy, "policy_optional": True} if self.policy else {}),
            **({"untested_vllm": v} if (v := self.settings.untested_vllm) else {}),
            **({"store_max_bytes": self.store_max_bytes} if self.store_max_bytes else {}),
        }
        transfer = {
            "kv_connector": "LCGuardConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        return [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            self.model,
            "--served-model-name",
            self.name,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--kv-transfer-config",
            json.dumps(transfer),
            *(f"--{name.replace('_', '-')}={value}" for name, value in AS_TRANSFORMERS.items()),
            # a line for each request is a tenth of the time of a small one
            "--disable-uvicorn-access-log",
            "--middleware",
            MIDDLEWARE,
            *self.settings.args,
        ]


class Engine:
    """One vLLM process, started again when it dies."""

    def __init__(
        self,
        plan: EnginePlan,
        key: bytes,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        refuse: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``refuse`` is told why it will never start: the connector, or vLLM's own reading of its
        arguments, refused the first start."""
        self.plan, self._say, self._clock, self._refuse = plan, say, clock, refuse
        self._deaths_s: list[float] = []
        """Within the window."""
        self.port = _free_port()
        self.api_key = secrets.token_urlsafe(32)
        self._key = key
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.failure = ""
        """Why it does not run, while it is not started again at once."""
        self.starts = 0
        self.answered = False
        """Whether the process that runs now was seen to serve."""
        self._spawned_s = 0.0
        self._late = ""
        self._log_start = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        p = self._process
        return p.pid if p is not None and p.returncode is None else None

    async def start(self) -> None:
        """Starts it; does not wait until it answers."""
        await self._spawn()
        self._watch = asyncio.ensure_future(self._supervise())

    async def stop(self) -> None:
        """Ends it and all that it started."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self._end()

    def check_start(self) -> None:
        """Kills a process that does not serve within ``start_timeout_s``: it counts as dead."""
        process, limit_s = self._process, self.plan.settings.start_timeout_s
        running = process is not None and process.returncode is None and not self.answered
        if process is not None and running and self._clock() - self._spawned_s > limit_s:
            self._late = f"it did not serve within start_timeout_s={limit_s:g}"
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _spawn(self) -> None:
        environment = os.environ | {
            KEY_VARIABLE: self._key.hex(),
            "VLLM_API_KEY": self.api_key,
            "VLLM_PLUGINS": "lcguard",
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment.setdefault(CPU_CACHE, CPU_CACHE_GIB)
        with private_log(self.plan.log) as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self.plan.command(self.port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        lower_priority(self._process.pid, self.plan.settings.nice)
        self.starts += 1
        self.answered, self._late, self._spawned_s = False, "", self._clock()

    async def _supervise(self) -> None:
        while self._process is not None:
            code = await self._process.wait()
            await self._end()  # its workers may have outlived it
            reason = f"vLLM ended with {code}: {self._late or self._why()}"
            if self._never(code):
                self.failure = reason
                self._refuse(reason)
                return
            await self._wait(reason)
            self.failure = ""
            await self._spawn()

    def _never(self, code: int) -> bool:
        """Whether the first start ended in what another would end in too. Whoever served once may
        have been killed by a request, and is started again."""
        if self.starts > 1 or self.answered or self._late:
            return False
        return code == _USAGE or "StartError" in _reason_line(self.plan.log, self._log_start)

    def _why(self) -> str:
        """What a start failed on, in vLLM's words: nobody had asked it anything. Later they may
        quote a request, and stay in its log."""
        if self.answered:
            return f"its log has the reason: {self.plan.log}"
        return last_reason(self.plan.log, self._log_start)

    async def _wait(self, reason: str) -> None:
        """Longer after each death; after too many within the window, until it has room again.

        Never for good: who found a way to kill it would else have killed it for everybody.
        """
        settings, now_s = self.plan.settings, self._clock()
        since_s = now_s - settings.restart_window_s
        self._deaths_s = [t for t in self._deaths_s if t > since_s] + [now_s]
        n, most = len(self._deaths_s), settings.restarts
        if n > most:
            until_s = self._deaths_s[n - most - 1] + settings.restart_window_s
            self.failure = f"{reason}; {n} times in {settings.restart_window_s:g} s, so it is " + (
                f"started again in {until_s - now_s:.0f} s"
            )
            self._say(self.failure)
        else:
            until_s = now_s + _BACKOFF_S[min(n, len(_BACKOFF_S)) - 1]
            self._say(f"{reason}; starting it again in {until_s - now_s:g} s ({most - n} left)")
        while (left_s := until_s - self._clock()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_S))

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            pass
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def lower_priority(pid: int, nice: int) -> None:
    """Of a process that has just started: what it starts later inherits it.

    Never raises it above our own, which takes privileges.
    """
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


def last_reason(log: Path, start: int = 0) -> str:
    """The line of vLLM's log, from byte ``start`` on, that says why it gave up, as far as one can
    tell."""
    try:
        wanted = _reason_line(log, start)
    except OSError as error:
        return f"{log.name} cannot be read: {error.strerror}"
    text = re.split(r"[Ee]rror: ", wanted, maxsplit=1)[-1] if wanted else "no reason in its log"
    return f"{' '.join(text.split())[:400]} (log: {log})"


def _reason_line(log: Path, start: int) -> str:
    """The connector's own where there is one, or the last error. Raises ``OSError``."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 64 * 1024))
        lines = file.read().decode(errors="replace").splitlines()
    errors = [x for x in lines if "StartError" in x or re.search(r"[Ee]rror: ", x)]
    return next((x for x in errors if "StartError" in x), errors[-1] if errors else "")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
