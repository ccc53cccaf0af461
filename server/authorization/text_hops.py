"""Hops of text: whether they may happen, what is hidden, and what the audit says of it.

A hop is decided before anything is guarded (``text``) and ends with what was hidden
(``text_guarded``), before the guarded text leaves. Neither row holds text.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lcguard.handoff.errors import HandoffError, LineageError
from lcguard.handoff.lineage import Restricted, on_top
from lcguard.handoff.names import ANY
from lcguard.handoff.policy import Edge, PolicyError
from lcguard.manifest import Lineage
from lcguard.server.access.keyring import Identity
from lcguard.server.audit.trail import Entry, Event
from lcguard.server.authorization.approved_handoff import edge_name, qualified, unavailable
from lcguard.server.authorization.authority import Authority
from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.vault import Kept, Vault
from lcguard.server.detection.detector import vouched
from lcguard.server.errors import ProxyError
from lcguard.text.guard import Guarded, TextGuard
from lcguard.text.placeholder import Placeholders
from lcguard.text.restoring import names_in, restored

T = TypeVar("T")


@dataclass
class TextHop:
    """One hop of text that may happen."""

    who: Identity
    request_id: str
    guard: TextGuard
    secrets: Sequence[str] | None
    conversation: str
    hidden: Counter[str] = field(default_factory=Counter)
    originals: dict[str, str] = field(default_factory=dict, repr=False)
    done: bool = False

    @property
    def edge(self) -> Edge:
        return self.guard.edge

    def add(self, found: Guarded[T]) -> T:
        """What may be handed over; what was hidden in it is counted."""
        self.hidden.update(found.hidden)
        self.originals |= found.originals
        return found.value

    def counts(self) -> dict[str, int]:
        """For the sender alone."""
        return dict(sorted(self.hidden.items()))

    def entry(self, event: Event, reason: str = "") -> Entry:
        tenant, source, audience = edge_name(self.edge)
        return Entry(
            event,
            "error" if event in ("failed", "aborted") else "allowed",
            tenant=tenant,
            agent=self.who.agent,
            source=source,
            audience=audience,
            guard="text",
            policy_digest=self.edge.digest,
            reason=reason,
            request_id=self.request_id,
        )


@dataclass(frozen=True)
class StandsOn:
    """Text of an agent that an answer stands on: its restrictions travel as a segment's do."""

    source_agent: str
    audience: str
    lineage: Lineage


def stands_on(hop: TextHop) -> StandsOn:
    """What the answer to a guarded text is restricted by."""
    edge = hop.edge
    lineage = Lineage(
        forbid=edge.forbid,
        derive=edge.derive,
        origins=(edge.source,),
        raw=False,
        custom=edge.definitions,
    )
    return StandsOn(edge.source, edge.audience, lineage)


class TextHops:
    """The decisions of one deployment."""

    def __init__(self, authority: Authority) -> None:
        self._authority, self._vault = authority, Vault(authority.key)

    async def open(
        self,
        who: Identity,
        source: str,
        audience: str,
        *,
        secrets: Sequence[str] | None,
        conversation: str,
        request_id: str,
        behind: Sequence[Restricted] = (),
    ) -> TextHop:
        """A hop between two agents of the caller's tenant, in the audit.

        Args:
            behind: what the text stands on, whose restrictions travel.

        Raises:
            ProxyError: 400 for what cannot be guarded, 403 for an edge that takes no text or is
                closed, 503 where nobody can tell. It is in the audit.
        """
        try:
            guard = await self._guard(who, source, audience, conversation, behind)
            guard.check_named(secrets)
            hop = TextHop(who, request_id, guard, secrets, conversation)
            await self._append([hop.entry("text")])
        except (HandoffError, PolicyError) as error:
            refused = _refusal(error)
            await self._refused(who, source, audience, request_id, refused)
            raise refused from None
        except ProxyError as error:
            await self._refused(who, source, audience, request_id, error)
            raise
        return hop

    async def _guard(
        self,
        who: Identity,
        source: str,
        audience: str,
        conversation: str,
        behind: Sequence[Restricted],
    ) -> TextGuard:
        a = self._authority
        if reason := a.block():
            raise ProxyError(503, reason, code="not_ready", retry_after_s=30)
        names = qualified(who.tenant, source), qualified(who.tenant, audience)
        edge = on_top(a.policy.for_edge(*names), a.policy, behind)
        if await a.closed(edge):
            raise ProxyError(
                403,
                f"the edge {edge.name.in_words} is closed: planted records were read off its "
                "segments",
                code="edge_closed",
            )
        return TextGuard(
            a.policy,
            *names,
            edge=edge,
            key=a.key,
            conversation=conversation,
            detect=lambda text, forbid: a.spans.detect(text, edge),
            vouched=vouched(edge.detect),
        )

    async def guarded(self, hop: TextHop, make: Callable[[TextGuard], Guarded[T]]) -> T:
        """What ``make`` lets pass. Raises ``ProxyError``; it is in the audit."""
        try:
            found = await self._authority.spans.run(hop.edge, make, hop.guard)
        except HandoffError as error:
            refused = _refusal(error)
            await self.end(hop, "failed", f"{refused.code}: {refused.message}")
            raise refused from None
        except ProxyError as error:
            await self.end(hop, "failed", f"{error.code}: {error.message}")
            raise
        return hop.add(found)

    async def finish(self, hop: TextHop) -> None:
        """Before what was guarded leaves. Raises ``ProxyError`` (503) where the audit, or the
        vault, cannot be written."""
        n = sum(hop.hidden.values())
        kept = self._keeper(hop) if hop.edge.restore and hop.originals else None
        await self._append([hop.entry("text_guarded", f"{n} values hidden")], kept)
        hop.done = True

    def _keeper(self, hop: TextHop) -> Callable[[Connection], None]:
        """Writes what the edge lets some have back into the vault."""
        tenant, source, audience = edge_name(hop.edge)
        until_s = self._authority.clock() + hop.edge.ttl_s

        def keep(connection: Connection) -> None:
            self._vault.keep(
                connection, tenant, hop.conversation, source, audience, hop.originals, until_s
            )

        return keep

    async def restore(
        self, who: Identity, conversation: str, value: Any, request_id: str
    ) -> tuple[Any, int, int]:
        """A value with what the caller may have back, how many placeholders that were, and how
        many were left.

        Raises ``ProxyError``: 400 for what is no JSON, 403 for an agent whom no edge's ``restore``
        names, 503 where nobody can tell. It is in the audit.
        """
        a = self._authority
        mine = [e for e in a.policy.edges if e.tenant in (ANY, who.tenant)]
        if who.role != "agent" or not any(who.agent in edge.restore for edge in mine):
            refused = ProxyError(
                403,
                f"no edge lets {who.role} {who.agent!r} have values back: name an agent under "
                "restore",
                code="policy",
            )
            await self._refused(who, "", who.agent, request_id, refused)
            raise refused
        placeholders = Placeholders(a.key, who.tenant, conversation)
        try:
            names = await a.spans.work(names_in, value, placeholders)
            kept = await asyncio.to_thread(
                a.audit.database.read,
                lambda c: self._vault.find(c, who.tenant, conversation, names, a.clock()),
            )
            originals = {k.name: k.value for k in kept if self._may(who, k)}
            made, n = await a.spans.work(restored, value, originals, placeholders)
        except HandoffError as error:
            raise _refusal(error) from None
        except DatabaseError as error:
            raise unavailable(error) from None
        entry = Entry(
            "text_restored",
            tenant=who.tenant,
            agent=who.agent,
            audience=who.agent,
            guard="text",
            reason=f"{len(originals)} of {len(names)} values restored",
            request_id=request_id,
        )
        await self._append([entry])
        return made, n, len(names - originals.keys())

    def _may(self, who: Identity, kept: Kept) -> bool:
        """Whether the policy of now lets the caller have it back."""
        names = qualified(who.tenant, kept.source), qualified(who.tenant, kept.audience)
        edge = self._authority.policy.for_edge(*names)
        return edge.channel == "text" and who.agent in edge.restore

    async def end(self, hop: TextHop, event: Event, reason: str) -> None:
        """A hop that did not come about."""
        if hop.done:
            return
        hop.done = True
        try:
            await self._append([hop.entry(event, reason)])
        except ProxyError:
            pass  # the row that allowed it has no end: it did not come about

    async def _append(
        self, entries: Sequence[Entry], also: Callable[[Connection], object] | None = None
    ) -> None:
        try:
            await self._authority.audit.append_all(entries, also)
        except DatabaseError as error:
            raise unavailable(error) from None

    async def _refused(
        self, who: Identity, source: str, audience: str, request_id: str, error: ProxyError
    ) -> None:
        entry = Entry(
            "refused",
            "blocked" if error.status < 500 else "error",
            tenant=who.tenant,
            agent=who.agent,
            source=source,
            audience=audience,
            guard="text",
            reason=f"{error.code}: {error.message}",
            request_id=request_id,
        )
        try:
            await self._authority.audit.append(entry)
        except DatabaseError as failed:
            if error.status < 500:
                raise unavailable(failed) from None


def _refusal(error: HandoffError | PolicyError) -> ProxyError:
    status = error.status if isinstance(error, HandoffError) else 400
    param = error.param if isinstance(error, HandoffError) else ""
    code = "policy" if status == 403 or isinstance(error, LineageError) else "text"
    where = f"lcguard.text.{param}" if param else None
    return ProxyError(status, str(error), code=code, param=where)
