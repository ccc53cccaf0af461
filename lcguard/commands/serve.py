"""``lcguard serve``: vLLM and the proxy with one command, or the proxy before a running vLLM."""

from __future__ import annotations

import importlib.util
import logging
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from rich.console import Console

from lcguard.agents.models import NAMED, model_location, served_guards
from lcguard.commands.policy import warnings
from lcguard.config import load_config
from lcguard.guards.frozen import finders
from lcguard.guards.registry_file import is_registry
from lcguard.guards.standing import check_proven
from lcguard.handoff.keys import KEY_VARIABLE, deployment_key, new_key
from lcguard.handoff.policy import Policy, check_finders, load_policy
from lcguard.handoff.policy_review import learned
from lcguard.private_files import open_to_others, private_folder
from lcguard.server.app import make_app
from lcguard.server.database.place import check_address, is_server
from lcguard.server.detection.span_finder import TextFinder
from lcguard.server.engine import EnginePlan
from lcguard.server.gateway.timed_http import TimedHttp
from lcguard.server.lifespan import Deployment, lifespan
from lcguard.server.settings import ServerSettings
from lcguard.server.state import Proxy
from lcguard.vllm.preflight import check_start
from lcguard.vllm.settings import PLAIN

NANO_ARGS = ("--dtype", "float32", "--max-model-len", "4096", "--enforce-eager")
CPU_INFO = Path("/proc/cpuinfo")
BF16 = ("avx512_bf16", "amx_bf16")
"""Of a processor that computes in bfloat16 itself."""
KEY_FILE = "deployment.key"
SEGMENTS = "segments"


def load_settings(
    state: Path, config: Path | None, sets: Sequence[str], upstream: str | None
) -> ServerSettings:
    """The settings with their paths made absolute. Raises ``ConfigError``."""
    found = config if config is not None else state / "server.yaml"
    overrides = [*sets, *([f"upstream.url={upstream}"] if upstream else [])]
    settings = load_config(
        ServerSettings, found if config is not None or found.exists() else None, overrides
    )
    folder, engine = state.resolve(), settings.engine
    guards = engine.guards or served_guards(engine.model)
    if any(is_registry(Path(at)) for at in guards.values()):
        state_key(state, make=False)  # which its signature is checked with, wherever it is read
    return replace(
        settings,
        engine=replace(engine, guards=guards),
        policy=folder / settings.policy,
        keys=folder / settings.keys,
        database=database_in(folder, settings.database),
        store=settings.store or own_store(state),
    )


def own_store(state: Path) -> str:
    """URL of the store inside the state folder."""
    return f"file://{state.resolve() / SEGMENTS}"


def database_in(folder: Path, database: str) -> str:
    """A server's address, or the path of a file. Raises ``ValueError`` for one with a password."""
    if is_server(database):
        check_address(database)
        return database
    return str(folder / database)


def state_key(state: Path, make: bool = True) -> bytes:
    """``LCGUARD_KEY``, or the key of the state folder, made at the first start.

    Raises ``ValueError`` for a key file that others may read, or that is not there.
    """
    if os.environ.get(KEY_VARIABLE, "").strip():
        return deployment_key()
    path = state / KEY_FILE
    if not path.exists():
        if not make:
            raise ValueError(f"{path} does not exist and {KEY_VARIABLE} is not set: set it")
        # opened for its owner alone, and never over another server's
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(new_key() + "\n")
    if why := open_to_others(path):
        raise ValueError(why)
    try:
        os.environ[KEY_VARIABLE] = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        # nothing of the key in the message, nor in its cause
        raise ValueError(f"{path} is no key: put back a copy, or remove it for a new one") from None
    return deployment_key()


def check_exposure(settings: ServerSettings) -> None:
    """Raises ``ValueError`` where vLLM would be reached beyond this machine without a key."""
    url = settings.upstream.url
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"upstream.url={url!r}: write http://host:port of vLLM's server")
    if not _loopback(parts.hostname) and not os.environ.get(settings.upstream.api_key_env):
        raise ValueError(
            f"upstream.url={url!r} is beyond this machine and has no key: start vLLM with "
            f"--api-key and set {settings.upstream.api_key_env}, or anyone there reads raw KV"
        )


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_of(settings: ServerSettings) -> tuple[str, str, tuple[str, ...]]:
    """Path, served name, and vLLM's arguments; makes the folder of a named model."""
    engine = settings.engine
    name = engine.served_model_name or Path(engine.model).name
    where = model_location(engine.model, lambda text: print(text, file=sys.stderr))
    return where, name, engine_args(settings)


def engine_args(settings: ServerSettings) -> tuple[str, ...]:
    """What vLLM is told about the model beside its name: the later of two wins."""
    return _own_args(settings.engine.model) + settings.engine.args


def _own_args(model: str) -> tuple[str, ...]:
    """Arguments of vLLM for a model of ours: they are small enough for a CPU, where bfloat16 is
    emulated on processors that lack it."""
    if model not in NAMED:
        return ()
    return NANO_ARGS[2:] if model != "nano" and bf16_flag() else NANO_ARGS


def bf16_flag() -> str:
    """By what instructions this processor computes in bfloat16; empty: by none."""
    flags = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    return next((flag for flag in BF16 if flag in flags), "")


def engine_guards(settings: ServerSettings) -> set[str] | None:
    """Guards of the engine that ``serve`` starts; None where it attaches to another."""
    return None if settings.upstream.url else {*PLAIN, *settings.engine.guards}


def policy_in(settings: ServerSettings) -> Policy:
    """The policy's file, held against the guards of the engine that ``serve`` starts. Raises
    ``PolicyError``, and ``GuardError`` for a guard that cannot be read."""
    policy = load_policy(settings.policy)
    if not settings.upstream.url:
        check_finders(policy, finders(settings.engine.guards), str(settings.policy))
    return policy


def serve(state: Path, settings: ServerSettings, console: Console) -> int:
    """Runs until SIGTERM or Ctrl-C. Raises ``ValueError`` for what cannot be served."""
    check_exposure(settings)
    if not settings.upstream.url and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed: `make vllm` (CPU) or pip install 'lcguard[vllm]', or attach to "
            "a running one with --upstream URL"
        )
    if not settings.keys.exists():
        raise ValueError(
            f"{settings.keys} does not exist: nobody could ask anything. Make a key with: "
            f"lcguard keys new AGENT --dir {state}"
        )
    with listening(settings.host, settings.port) as door:
        return _serve(state, settings, console, door)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with the address, taken before anything else is started.

    Raises ``ValueError`` for an address that is in use or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}; give another "
                "--host or --port, or end what uses it"
            ) from None
        yield made


def _text_detector() -> TextFinder:
    """Imported by edges that have it: with what reads its model it takes 230 MiB."""
    from lcguard.commands.text_detector import shared_text_detector

    return shared_text_detector()


def _checked(model: str, guards: dict[str, str], tokenizer: bool) -> None:
    """``check_start`` in a process of its own: reading a model's configuration imports its code,
    200 MiB that a proxy needs no more."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(check_start, model, guards, tokenizer).result()


def _serve(state: Path, settings: ServerSettings, console: Console, door: socket.socket) -> int:
    changed = private_folder(state)
    key = state_key(state)
    model, name, args = model_of(settings)
    plan, engine = None, settings.engine
    check_proven(engine.guards, engine.unproven, "--set engine.unproven=[{}]")
    if not settings.upstream.url:
        own = not any("tokenizer" in word for word in settings.engine.args)
        _checked(model, dict(settings.engine.guards), own)
        plan = EnginePlan(
            replace(settings.engine, args=args),
            model,
            name,
            str(settings.policy),
            settings.store,
            settings.store_max_bytes,
            state.resolve() / "vllm.log",
            settings.store_timeout_s,
        )

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if changed:
        say(changed)
    worker = (sys.executable, "-m", "lcguard.commands.canary")
    if settings.policy.exists():
        policy = policy_in(settings)
        for line in warnings(policy, settings.keys, engine_guards(settings)):
            say(line)
        if learned(policy) or any(edge.detect == "lcguard" for edge in policy.edges):
            from lcguard.commands.text_detector import MODEL

            model_location(MODEL, say)  # what it lacks is said now, not to the first publisher
    deployment = Deployment(
        settings, key, model, name, plan, state.resolve(), say, worker, _text_detector
    )
    failed: list[Exception] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[Proxy]:
        async with AsyncExitStack() as stack:
            try:
                proxy = await stack.enter_async_context(lifespan(deployment))
            except (ValueError, RuntimeError, OSError) as error:
                failed.append(error)
                raise
            yield proxy

    app = make_app(opened)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        http=TimedHttp.with_timeouts(
            settings.limits.body_timeout_s, settings.limits.write_timeout_s
        ),
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
        server_header=False,
        date_header=False,
    )
    server, log = _Server(config, deployment), logging.getLogger("uvicorn.error")
    deployment.refuse = server.refuse

    def unsaid(record: logging.LogRecord) -> bool:
        return not failed  # said below in one line, not as a traceback

    log.addFilter(unsaid)
    try:
        server.run([door])
    except SystemExit:
        if not failed:
            raise
    finally:
        log.removeFilter(unsaid)
    if failed:
        raise ValueError(f"cannot start: {failed[0]}")
    if server.refused:
        raise ValueError(f"cannot start: {server.refused}")
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Says that it drains before it stops to listen."""

    def __init__(self, config: uvicorn.Config, deployment: Deployment) -> None:
        super().__init__(config)
        self._deployment = deployment
        self.refused = ""
        """Why the engine will never start as it was told."""

    def refuse(self, reason: str) -> None:
        """Ends the server: starting the engine again would end in the same way."""
        self.refused, self.should_exit = reason, True

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._deployment.drain()
        super().handle_exit(sig, frame)
        # uvicorn raises them again at its end; a stop that was asked for is no failure
        self._captured_signals.clear()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = self.config.host
            # what listens everywhere is called on loopback
            local = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
            self._deployment.url = f"http://{local}:{port}"
            self._deployment.say(f"listening on http://{host}:{port}")
