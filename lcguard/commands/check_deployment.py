"""``lcguard doctor`` on a deployment: state folder, files, model, guards, store, port and server.

Nothing is made, started or downloaded: of the store alone a little is written, read and deleted.
No key and no password is in what is said.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from lcguard.agents.models import NAMED, model_location
from lcguard.cache import kv_shape
from lcguard.commands.checks import Advice, Check
from lcguard.commands.policy import summary, unended, warnings
from lcguard.commands.running_server import readiness_of
from lcguard.commands.serve import (
    KEY_FILE,
    SEGMENTS,
    check_exposure,
    engine_guards,
    listening,
    own_store,
    policy_in,
    state_key,
)
from lcguard.commands.text_detector import MODEL
from lcguard.guards.standing import check_proven
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.handoff.policy import Policy
from lcguard.handoff.policy_review import learned
from lcguard.hub import local_folder, supported_config
from lcguard.model_files import check_readable, weight_files
from lcguard.private_files import open_to_others
from lcguard.server.access.keyring import load_keys
from lcguard.server.database.place import is_server, place_of, reading
from lcguard.server.settings import ServerSettings
from lcguard.server.tracing.environment import asked_by
from lcguard.store import open_store
from lcguard.vllm.probe import model_support
from lcguard.vllm.setup import digest_of, saved_guard


def policy_report(settings: ServerSettings) -> tuple[str, list[str]]:
    """What the policy's file holds, and its warnings: what ``lcguard config check`` says.

    Raises ``PolicyError`` and ``GuardError`` as ``policy_in``.
    """
    if not settings.policy.exists():
        return "no file: every category is forbidden on every edge", []
    policy = policy_in(settings)
    return summary(policy), warnings(policy, settings.keys, engine_guards(settings))


@dataclass
class DeploymentChecks:
    """Of one state folder, with the settings that the server would have."""

    state: Path
    settings: ServerSettings
    running: dict[str, object] | None = field(default=None, init=False)
    """What ``/readyz`` of a server answered that listens there."""

    def __post_init__(self) -> None:
        self.running = readiness_of(self.settings.host, self.settings.port)

    def checks(self) -> dict[str, Check]:
        """In the order in which one would mend them."""
        guards = {f"guard {name}": self._guard(name) for name in self.settings.engine.guards}
        return {
            "state folder": self.folder,
            "deployment key": self.key,
            "upstream": self.upstream,
            "keys": self.keys,
            "policy": self.policy,
            "model": self.model,
            **guards,
            "database": self.database,
            "store": self.store,
            "port": self.port,
            "server": self.server,
        }

    def folder(self) -> str:
        """Its owner's alone, with all that the server keeps in it, and ours to write to."""
        s, inside = self.settings, self.state.resolve()
        own = [] if is_server(s.database) else [Path(s.database)]
        files = (inside / KEY_FILE, s.keys, *own, inside / "leakage.json")
        for path in (inside, *files):
            # what is mounted from elsewhere is that place's to protect
            if path.is_relative_to(inside) and path.exists() and (why := open_to_others(path)):
                raise ValueError(why)
        if not os.access(self.state, os.W_OK | os.X_OK):
            raise ValueError(
                f"{self.state} cannot be written to: run this and the server as its owner, and "
                "where it is mounted, mount it to be written to"
            )
        return f"{self.state}, its owner's alone"

    def key(self) -> str:
        """What signs segments."""
        given = bool(os.environ.get(KEY_VARIABLE, "").strip())
        if not given and not (self.state / KEY_FILE).exists():
            if self.settings.upstream.url:
                raise ValueError(f"{KEY_VARIABLE} is not set: set it to that of the running vLLM")
            return f"none yet: the first start makes {KEY_FILE}"
        state_key(self.state, make=False)
        return f"in {KEY_VARIABLE}" if given else f"in {KEY_FILE}"

    def upstream(self) -> str:
        """How vLLM is reached."""
        check_exposure(self.settings)
        u = self.settings.upstream
        if not u.url:
            return "none: lcguard serve starts vLLM itself"
        if not os.environ.get(u.api_key_env):
            raise Advice(
                f"{u.api_key_env} is not set here: the server needs it, with vLLM's VLLM_API_KEY"
            )
        return f"attaches to {urlsplit(u.url).hostname}, with a key in {u.api_key_env}"

    def keys(self) -> str:
        """Who may ask."""
        entries, now = load_keys(self.settings.keys).keys, datetime.now(UTC)
        over = sum(e.expires_at is not None and e.expires_at <= now for e in entries)
        told = f"{len(entries)}, of which {over} expired" if over else str(len(entries))
        if over == len(entries):
            raise ValueError(
                f"{told}: nobody can ask anything; make one with: lcguard keys new AGENT "
                f"--dir {self.state}"
            )
        return told

    def policy(self) -> str:
        """What ``lcguard policy check`` and ``lcguard config check`` say."""
        told, advice = policy_report(self.settings)
        path = self.settings.policy
        advice += [unended(path)] if path.exists() and unended(path) else []
        if advice:
            raise Advice(f"{told}; " + "; ".join(a.removeprefix("warning: ") for a in advice))
        return told

    @cached_property
    def model_folder(self) -> Path:
        """Raises ``Advice`` where the model is still to be made or downloaded, which a start does,
        and ``ValueError`` where there is no such."""
        name = self.settings.engine.model
        if name in NAMED and not NAMED[name].ready():
            raise Advice(f"{name} is still to be made: lcguard models prepare {name}")
        return _downloaded(model_location(name))

    def model(self) -> str:
        """Whole, with a tokenizer, of a kind that is supported; and its digest."""
        folder = self.model_folder
        check_readable(folder)
        found = model_support(str(folder))
        if found.ok is False:
            raise ValueError(found.detail)
        return f"{self.settings.engine.model}: {found.detail}; digest {digest_of(folder)[:12]}"

    def model_bytes(self) -> int:
        """Of its weights, as they are stored. Raises ``ValueError``."""
        return sum(path.stat().st_size for path in weight_files(self.model_folder))

    def _guard(self, name: str) -> Check:
        def check() -> str:
            """Whole, made for this model, and not unmeasured unless that was accepted."""
            engine = self.settings.engine
            try:
                folder = self.model_folder
            except ValueError:
                raise Advice("not looked at: it is held against the model, which fails") from None
            at = engine.guards[name]
            if at.count("/") == 1 and at[0] not in "./~":
                at = str(_downloaded(at))
            shape = kv_shape(supported_config(str(folder)))
            guard = saved_guard(name, at, digest_of(folder), shape)
            check_proven({name: at}, engine.unproven, "--set engine.unproven=[{}]")
            told = f"{at}: {guard.card.guard}, digest {guard.digest[:12]}"
            if name in engine.unproven:
                raise Advice(f"{told}; served unproven, as engine.unproven says: measure it")
            return told

        return check

    def database(self) -> str:
        """Audit and ledger, which must answer; a file is made by the first start."""
        s = self.settings
        if not is_server(s.database) and not Path(s.database).exists():
            return f"{s.database}: the first start makes it"
        place = place_of(s.database, s.database_timeout_s)
        with reading(place):
            return f"{place.name} answers"

    def store(self) -> str:
        """A write, a read and a delete."""
        s = self.settings
        where = s.store.split("@")[-1]
        if s.store == own_store(self.state) and not (self.state / SEGMENTS).exists():
            return f"{where}: the first start makes it"
        store = open_store(s.store, max_bytes=s.store_max_bytes, timeout_s=s.store_timeout_s)
        try:
            store.check()
        finally:
            store.close()
        return f"{where}: a write, a read and a delete were done"

    def port(self) -> str:
        """Free, or the server's own."""
        host, port = self.settings.host, self.settings.port
        if self.running is not None:
            return f"{host}:{port} is the running server's"
        with listening(host, port):
            return f"{host}:{port} is free" if port else "any that is free"

    def server(self) -> str:
        """What a running one says of itself."""
        if self.running is None:
            return "none is running"
        if not self.running["ready"]:
            reasons = self.running.get("reasons")
            said = "; ".join(map(str, reasons)) if isinstance(reasons, list) else "it does not say"
            raise ValueError(f"running and not ready: {said}")
        return "running and ready"

    def needed_extras(self) -> dict[str, str]:
        """Extra -> what of this deployment needs it."""
        s, out = self.settings, {}
        if s.store.startswith(("redis://", "rediss://")):
            out["store"] = "the store"
        if is_server(s.database):
            out["postgres"] = "the database"
        if variable := asked_by(os.environ):
            out["otel"] = variable
        try:
            policy = policy_in(s) if s.policy.exists() else Policy(version=1, edges=())
        except ValueError:
            return out  # said by its own check
        detectors = {edge.detect for edge in policy.edges}
        if "presidio" in detectors:
            out["pii"] = "an edge with detect: presidio"
        if not NAMED[MODEL].ready():
            if "lcguard" in detectors:
                out["real"] = "an edge with detect: lcguard"
            elif learned(policy):
                out["real"] = "a category that is found by examples"
        if s.engine.model == MODEL and not NAMED[MODEL].ready():
            out["real"] = f"the model {MODEL}"
        return out


def _downloaded(name: str) -> Path:
    """A folder, or where a hub repository lies. Raises ``Advice`` for one that is still to come."""
    try:
        return local_folder(name)
    except ValueError:
        raise Advice(f"{name} is not on this machine: the first start downloads it") from None
