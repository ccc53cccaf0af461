"""vLLM and the proxy as processes of their own, on loopback, for benchmarks, soaks and tests."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcguard.agents.nano.load import model_path
from lcguard.commands.keys import new_key as new_api_key
from lcguard.commands.serve import NANO_ARGS
from lcguard.handoff.keys import KEY_VARIABLE, new_key
from lcguard.private_files import private_log
from lcguard.server.engine import EnginePlan, lower_priority
from lcguard.server.settings import EngineSettings

START_S = 900.0
UPSTREAM_KEY = "LCGUARD_UPSTREAM_KEY"


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    api_key: str = ""

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, and SIGKILL to the whole group where that is not enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def get(self, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body; 0 where nobody answers."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            request = urllib.request.Request(self.url + path, headers=headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                return error.code, error.read()
        except OSError:
            return 0, b""

    def wait(self, path: str, timeout_s: float = START_S) -> None:
        """Until ``path`` answers 200. Raises ``RuntimeError`` with the log's end."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.get(path)[0] == 200:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"{path} did not come up:\n{self.log.read_text()[-3000:]}")


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
    with private_log(log) as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=dict(environment),
            start_new_session=True,
        )


class Site:
    """A folder with keys, policy and deployment key, and what runs on it."""

    def __init__(self, folder: Path, policy: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = os.environ | {KEY_VARIABLE: new_key(), "VLLM_LOGGING_LEVEL": "WARNING"}
        self.policy = folder / "policy.yaml"
        if policy is not None:
            self.policy.write_text(json.dumps(policy))
        self.store = f"file://{folder / 'segments'}"
        self.door = True
        """Whether its vLLM asks for a key on every route."""

    def key(self, agent: str, tenant: str = "default", **more: Any) -> str:
        """A new API key of an agent."""
        return new_api_key(self.folder / "keys.yaml", agent, tenant=tenant, **more)

    @contextmanager
    def engine(
        self, guards: Mapping[str, str] | None = None, args: Sequence[str] = ()
    ) -> Iterator[Running]:
        """vLLM on the nano agent, with the connector; ``args``: further ones of its server."""
        port, log = free_port(), self.folder / "vllm.log"
        settings = EngineSettings(
            guards=dict(guards or {"gate": "nano:gate"}), args=(*NANO_ARGS, *args)
        )
        policy = str(self.policy) if self.policy.exists() else ""
        plan = EnginePlan(settings, str(model_path()), "nano", policy, self.store, None, log)
        key = secrets.token_urlsafe(16)
        environment = self.environment | {
            "VLLM_API_KEY": key,
            "VLLM_PLUGINS": "lcguard",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        command = plan.command(port)
        if not self.door:
            at = command.index("--middleware")
            del command[at : at + 2]
        process = _spawn(command, environment, log)
        lower_priority(process.pid, settings.nice)
        running = Running(process, f"http://127.0.0.1:{port}", log, key)
        try:
            running.wait("/health")
            yield running
        finally:
            running.stop()

    @contextmanager
    def proxy(
        self, upstream: Running | None = None, /, ready: bool = True, **settings: Any
    ) -> Iterator[Running]:
        """``lcguard serve``; with its own vLLM where no ``upstream`` is given."""
        port, log = free_port(), self.folder / "proxy.log"
        config = self.folder / "server.yaml"
        base: dict[str, Any] = {"canaries": {"enabled": False}} | settings
        config.write_text(json.dumps(base | {"port": port}))
        command = [sys.executable, "-m", "lcguard.cli", "serve", "--dir", str(self.folder)]
        environment = dict(self.environment)
        if upstream is not None:
            command += ["--upstream", upstream.url]
            environment[UPSTREAM_KEY] = upstream.api_key
        running = Running(_spawn(command, environment, log), f"http://127.0.0.1:{port}", log)
        try:
            if ready:
                running.wait("/readyz")
            yield running
        finally:
            running.stop()
