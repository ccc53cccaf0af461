"""Opens a deployment in the order in which its parts need each other, and closes it again."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcguard.guards.frozen import finders
from lcguard.handoff.policy import Policy
from lcguard.handoff.policy_reader import PolicyReader
from lcguard.reloading import ReloadingFile
from lcguard.server.access.keyring import Keyring
from lcguard.server.audit.config_changes import note_changes
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.authorization.active_reads import end_revoked
from lcguard.server.authorization.authority import Authority
from lcguard.server.authorization.settlement import Settlement
from lcguard.server.authorization.text_hops import TextHops
from lcguard.server.database.connection import DatabaseError
from lcguard.server.database.place import is_server
from lcguard.server.database.vault import sweep_originals
from lcguard.server.database.writer import Database
from lcguard.server.detection.span_finder import SpanFinder, TextFinder
from lcguard.server.engine import Engine, EnginePlan
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.health.clocks import Clocks
from lcguard.server.health.conditions import Conditions
from lcguard.server.health.guard_files import GuardFiles
from lcguard.server.health.readiness import Readiness, Watch
from lcguard.server.health.selftest import SelfTest
from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.canary_jobs import canary_job
from lcguard.server.leakage.draw_budget import sweep_draws
from lcguard.server.leakage.ledger import sweep
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.server.limits.concurrency import ConcurrencyLimit
from lcguard.server.limits.key_limits import KeyLimits, Limits
from lcguard.server.limits.shared_limits import SharedLimits, sweep_accounts
from lcguard.server.settings import ServerSettings
from lcguard.server.state import Proxy
from lcguard.server.tracing.environment import open_tracing
from lcguard.store import SegmentStore, open_store
from lcguard.store.line import StoreLine

WATCH_S = 4.0
"""Between two looks at the conditions of readiness."""
SWEEP_S = 600.0


@dataclass
class Deployment:
    """What ``lcguard serve`` was told."""

    settings: ServerSettings
    key: bytes
    model: str
    """Folder or hub repository."""
    name: str
    """As clients call it."""
    plan: EnginePlan | None
    """Of the vLLM to start; None: attach to ``upstream.url``."""
    state: Path
    say: Callable[[str], None]
    canary_command: Sequence[str] = ()
    """The worker that plants and attacks; none: no canaries."""
    text_finder: Callable[[], TextFinder] | None = None
    """Loads the detector of edges with ``detect: lcguard``."""
    url: str = ""
    """Where the proxy listens."""
    readiness: Readiness = field(default_factory=Readiness)
    engine: Engine | None = None

    refuse: Callable[[str], None] = lambda reason: None
    """Told why the engine that was to be started never will."""

    def drain(self) -> None:
        """Not ready from now on; what runs may end."""
        self.readiness.draining = True


def policy_of(settings: ServerSettings) -> ReloadingFile[Policy]:
    """The policy's file, followed; until there is one, everything is forbidden.

    Raises ``PolicyError``, and ``GuardError`` for a guard that cannot be read.
    """
    # the guards of an engine that others started are its own to know: it refuses what they miss
    known = None if settings.upstream.url else finders(settings.engine.guards)
    nothing = Policy(version=1, edges=())
    return ReloadingFile(settings.policy, PolicyReader(known), absent=nothing)


@dataclass(frozen=True)
class _Storage:
    """Where segments lie, what was done with them, and what they lost."""

    store: SegmentStore
    line: StoreLine
    database: Database
    audit: AuditLog
    meter: LeakageMeter


@asynccontextmanager
async def lifespan(deployment: Deployment) -> AsyncIterator[Proxy]:
    """The running proxy. Raises ``ValueError`` and ``RuntimeError`` for what cannot be opened."""
    async with AsyncExitStack() as stack:
        policy = policy_of(deployment.settings)
        keyring = Keyring(deployment.settings.keys)
        storage = open_storage(deployment, stack)
        upstream = await open_upstream(deployment, stack)
        conditions = open_conditions(deployment, policy, storage, upstream)
        proxy = open_proxy(deployment, stack, policy, keyring, storage, upstream, conditions)
        watch = Watch(deployment.readiness, conditions.checks(), WATCH_S)
        await proxy.audit.append(Entry("start", policy_digest=proxy.authority.policy.digest))
        work = [watch.run(), _announce(deployment), _sweeps(proxy), note_changes(proxy)]
        work.append(end_revoked(proxy.active_reads, proxy.database))
        if proxy.shared_limits is not None:
            work.append(proxy.shared_limits.keep_leases())
        if deployment.settings.canaries.enabled and deployment.canary_command:
            proxy.canaries = canary_runner(deployment, proxy)
            work.append(_canaries(deployment.readiness, proxy.canaries))
        stack.push_async_callback(_stop, proxy, [asyncio.ensure_future(w) for w in work])
        yield proxy


def open_storage(deployment: Deployment, stack: AsyncExitStack) -> _Storage:
    """The segment store, the database and what canaries found."""
    s = deployment.settings
    store = open_store(s.store, max_bytes=s.store_max_bytes, timeout_s=s.store_timeout_s)
    stack.callback(store.close)
    line = StoreLine(s.store_timeout_s)
    stack.callback(line.close)
    database = Database(s.database, busy_timeout_s=s.database_timeout_s)
    stack.callback(database.close)
    meter = LeakageMeter(database, s.canaries.threshold, s.canaries.interval_s)
    meter.adopt_file(deployment.state / "leakage.json")
    return _Storage(store, line, database, AuditLog(database, deployment.key), meter)


async def open_upstream(deployment: Deployment, stack: AsyncExitStack) -> Upstream:
    """The connections to vLLM, which is started where the deployment has a plan for it."""
    settings = deployment.settings.upstream
    url, api_key = settings.url, os.environ.get(settings.api_key_env, "")
    if deployment.plan is not None:
        deployment.engine = engine = Engine(
            deployment.plan, deployment.key, deployment.say, refuse=deployment.refuse
        )
        url, api_key = engine.url, engine.api_key
        await engine.start()
        stack.push_async_callback(engine.stop)
    upstream = Upstream(settings, url, api_key)
    await upstream.start()
    stack.push_async_callback(upstream.close)
    return upstream


def open_conditions(
    deployment: Deployment, policy: ReloadingFile[Policy], storage: _Storage, upstream: Upstream
) -> Conditions:
    """What has to hold before anyone is served."""
    store, line = storage.store, storage.line
    return Conditions(
        SelfTest(upstream, deployment.name, store, line, deployment.key, policy.current),
        Clocks(upstream, store, line),
        GuardFiles(deployment.settings.engine.guards),
        policy,
        storage.audit,
        store,
        line,
        deployment.engine,
    )


def open_proxy(
    deployment: Deployment,
    stack: AsyncExitStack,
    policy: ReloadingFile[Policy],
    keyring: Keyring,
    storage: _Storage,
    upstream: Upstream,
    conditions: Conditions,
) -> Proxy:
    """The proxy around all of them."""
    s, key, store, line = deployment.settings, deployment.key, storage.store, storage.line
    audit, meter = storage.audit, storage.meter
    files = conditions.guard_files
    spans = SpanFinder(
        upstream, deployment.model, s.limits.redact_timeout_s, deployment.text_finder
    )
    stack.callback(spans.close)
    tracing = open_tracing(os.environ)
    stack.callback(tracing.close)
    authority = Authority(
        policy, store, line, key, audit, meter, spans, conditions.publishing_blocked
    )
    return Proxy(
        settings=s,
        key=key,
        model=deployment.name,
        upstream=upstream,
        keyring=keyring,
        database=storage.database,
        audit=audit,
        store=store,
        line=line,
        meter=meter,
        authority=authority,
        text_hops=TextHops(authority),
        settlement=Settlement(store, line, key, audit, files.unproven),
        readiness=deployment.readiness,
        limits=KeyLimits(Limits(concurrency=s.limits.key_concurrency)),
        concurrency=ConcurrencyLimit(
            s.limits.max_concurrency, s.limits.max_queue, s.limits.queue_timeout_s
        ),
        shared_limits=shared_limits(storage.database),
        policy_error=lambda: policy.error,
        context=lambda: conditions.selftest.context,
        tracing=tracing,
        engine_starts=lambda: deployment.engine.starts if deployment.engine else 0,
        certificates=files.certificates,
        unproven=files.unproven,
    )


def shared_limits(database: Database) -> SharedLimits | None:
    """Where other proxies may count too."""
    if not is_server(database.where):
        return None
    return SharedLimits(database, f"{socket.gethostname()}-{secrets.token_hex(8)}")


def canary_runner(deployment: Deployment, proxy: Proxy) -> CanaryRunner:
    """The schedule of canaries, which publish through this very proxy."""
    c = deployment.settings.canaries
    job = canary_job(proxy, deployment.model, lambda: deployment.url)
    return CanaryRunner(
        deployment.canary_command, job, proxy.meter, c.interval_s, c.timeout_s, proxy.edge_changed
    )


async def _stop(proxy: Proxy, tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    with suppress(DatabaseError):
        await proxy.audit.append(Entry("stop"))


async def _announce(deployment: Deployment) -> None:
    """Says when it becomes ready, and why it no longer is."""
    before: Any = None
    while True:
        state = deployment.readiness
        now = state.ready or tuple(state.reasons())
        if now != before:
            text = "ready" if now is True else "not ready: " + state.reasons()[0]
            deployment.say(text)
            before = now
        await asyncio.sleep(0.25)


async def _canaries(readiness: Readiness, runner: CanaryRunner) -> None:
    """Before it is ready there is nothing to screen, and an error would look like one."""
    while not readiness.ready:
        await asyncio.sleep(0.5)
    await runner.run()


async def _sweeps(proxy: Proxy) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        with suppress(DatabaseError):
            await proxy.database.write(lambda c: sweep(c, proxy.authority.clock()))
            await proxy.database.write(lambda c: sweep_draws(c, proxy.authority.clock()))
            await proxy.database.write(lambda c: sweep_originals(c, proxy.authority.clock()))
            await proxy.database.write(lambda c: sweep_accounts(c, proxy.authority.clock()))
