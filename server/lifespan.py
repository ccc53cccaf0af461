"""Opens a deployment in the order in which its parts need each other, and closes it again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcguard.guards import FrozenGuard
from lcguard.guards.frozen import GuardError
from lcguard.guards.shipped import guard_folder
from lcguard.handoff.policy import Policy
from lcguard.handoff.policy_reader import PolicyReader
from lcguard.reloading import ReloadingFile
from lcguard.server.access.keyring import Keyring
from lcguard.server.audit.config_changes import note_changes
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.authorization.authority import Authority
from lcguard.server.authorization.settlement import Settlement
from lcguard.server.database.writer import Database, DatabaseError
from lcguard.server.detection.span_finder import SpanFinder
from lcguard.server.engine import Engine, EnginePlan
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.health.clocks import Clocks
from lcguard.server.health.readiness import Readiness, Watch
from lcguard.server.health.selftest import GuardFiles, SelfTest
from lcguard.server.leakage.canaries import CanaryRunner
from lcguard.server.leakage.canary_jobs import canary_job
from lcguard.server.leakage.draw_budget import sweep_draws
from lcguard.server.leakage.ledger import sweep
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.server.limits.concurrency import Gate
from lcguard.server.limits.key_limits import KeyLimits, Limits
from lcguard.server.settings import ServerSettings
from lcguard.server.state import Proxy
from lcguard.store import open_store
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
    url: str = ""
    """Where the proxy listens."""
    readiness: Readiness = field(default_factory=Readiness)
    engine: Engine | None = None

    def drain(self) -> None:
        """Not ready from now on; what runs may end."""
        self.readiness.draining = True


def policy_of(settings: ServerSettings) -> ReloadingFile[Policy]:
    """The policy's file, followed; until there is one, everything is forbidden.

    Raises ``PolicyError``.
    """
    return ReloadingFile(settings.policy, PolicyReader(), absent=Policy(version=1, edges=()))


@asynccontextmanager
async def lifespan(deployment: Deployment) -> AsyncIterator[Proxy]:
    """The running proxy. Raises ``ValueError`` and ``RuntimeError`` for what cannot be opened."""
    s = deployment.settings
    async with AsyncExitStack() as stack:
        policy = policy_of(s)
        keyring = Keyring(s.keys)
        store = open_store(s.store, max_bytes=s.store_max_bytes, timeout_s=s.store_timeout_s)
        stack.callback(store.close)
        line = StoreLine(s.store_timeout_s)
        stack.callback(line.close)
        database = Database(s.database, busy_timeout_s=s.database_timeout_s)
        stack.callback(database.close)
        audit = AuditLog(database, deployment.key)
        c = s.canaries
        meter = LeakageMeter(deployment.state / "leakage.json", c.threshold, c.interval_s)
        url, api_key = s.upstream.url, os.environ.get(s.upstream.api_key_env, "")
        if deployment.plan is not None:
            deployment.engine = engine = Engine(deployment.plan, deployment.key, deployment.say)
            url, api_key = engine.url, engine.api_key
            await engine.start()
            stack.push_async_callback(engine.stop)
        upstream = Upstream(s.upstream, url, api_key)
        await upstream.start()
        stack.push_async_callback(upstream.close)
        test = SelfTest(
            upstream, deployment.name, store, line, deployment.key, lambda: authority.policy
        )
        clocks = Clocks(upstream, store, line)
        files = GuardFiles(s.engine.guards)
        blocked: dict[str, str] = {}
        spans = SpanFinder(upstream, deployment.model, s.limits.redact_timeout_s)
        stack.callback(spans.close)
        authority = Authority(
            policy,
            store,
            line,
            deployment.key,
            audit,
            meter,
            spans,
            lambda: next(iter(blocked.values()), ""),
        )
        proxy = Proxy(
            s,
            deployment.key,
            deployment.name,
            upstream,
            keyring,
            database,
            audit,
            store,
            line,
            meter,
            authority,
            Settlement(store, line, deployment.key, audit),
            deployment.readiness,
            KeyLimits(Limits(concurrency=s.limits.key_concurrency)),
            Gate(s.limits.max_concurrency, s.limits.max_queue, s.limits.queue_timeout_s),
        )
        proxy.policy_error = lambda: policy.error
        proxy.context = lambda: test.context
        proxy.certificates = certificates(s.engine.guards)
        starts = 0

        async def engine_lives() -> str:
            nonlocal starts
            engine = deployment.engine
            if engine is not None:
                if engine.starts != starts:
                    starts = engine.starts
                    test.forget()
                if engine.failure:
                    raise ProxyError(503, engine.failure, code="engine")
            try:
                detail = await test.engine()
            except ProxyError:
                if engine is not None:
                    engine.check_start()
                raise
            if engine is not None:
                engine.answered = True
            return detail

        async def guards_intact() -> str:
            try:
                detail = await asyncio.to_thread(files.check, test.digests)
            except ProxyError as error:
                blocked["guards"] = error.message
                raise
            blocked.pop("guards", None)
            return detail

        async def door_shut() -> str:
            try:
                detail = await test.door()
            except ProxyError as error:
                if error.code == "door":
                    blocked["door"] = error.message
                raise
            blocked.pop("door", None)
            return detail

        async def policy_good() -> str:
            if error := proxy.policy_error():
                raise ProxyError(503, f"{error}; the one before is in force", code="policy")
            return f"digest {authority.policy.digest[:12]}"

        async def audit_works() -> str:
            await database.write(lambda connection: None)
            return f"{(await asyncio.to_thread(audit.head)).count} rows"

        async def store_works() -> str:
            await line.run(store.check)
            return "a write, a read and a delete were done"

        watch = Watch(
            deployment.readiness,
            {
                "engine": engine_lives,
                "door": door_shut,
                "store": store_works,
                "clocks": clocks.check,
                "guards": test.guards,
                "guard_files": guards_intact,
                "policy": policy_good,
                "audit": audit_works,
            },
            WATCH_S,
        )
        await audit.append(Entry("start", policy_digest=authority.policy.digest))
        tasks = [
            asyncio.ensure_future(t)
            for t in (
                watch.run(),
                _announce(deployment),
                _sweeps(proxy),
                note_changes(proxy),
            )
        ]
        if c.enabled and deployment.canary_command:
            job = canary_job(proxy, deployment.model, lambda: deployment.url)
            runner = CanaryRunner(
                deployment.canary_command, job, meter, c.interval_s, c.timeout_s, proxy.edge_changed
            )
            proxy.canaries = runner
            tasks.append(asyncio.ensure_future(_canaries(deployment.readiness, runner)))
        try:
            yield proxy
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(DatabaseError):
                await audit.append(Entry("stop"))


def certificates(folders: Mapping[str, str]) -> dict[str, float]:
    """Guard to the mean pair leak on its card, in nats."""
    out = {}
    for name, folder in folders.items():
        with suppress(GuardError):
            card = FrozenGuard.from_pretrained(guard_folder(folder)).card
            if card.certificate is not None:
                out[name] = float(card.certificate["mean_nats"])
    return out


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
