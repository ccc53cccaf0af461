"""Decides whether a handoff may happen.

Every decision is in the audit before vLLM hears of it, so that a crash loses none. What cannot be
decided, because the policy, the store, the ledger or the audit is out of reach, does not happen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lcguard.handoff.audiences import Hop, check_alike, check_hops, hops_of
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.grants import make_grant, new_handle
from lcguard.handoff.lineage import declassified
from lcguard.handoff.names import split_tenant
from lcguard.handoff.policy import Edge, Policy
from lcguard.handoff.request import AlsoFor, EnginePublish
from lcguard.manifest import Manifest, SegmentError
from lcguard.reloading import ReloadingFile, in_force
from lcguard.server.access.keyring import Identity
from lcguard.server.audit.trail import AuditLog, Entry
from lcguard.server.authorization.approved_handoff import (
    GRANT_S,
    ApprovedHandoff,
    ApprovedPublish,
    consumption,
    edge_name,
    gone,
    publication,
    publications,
    qualified,
    signed_order,
    unavailable,
)
from lcguard.server.authorization.consumable import check_consumable
from lcguard.server.authorization.rule_digest import rule_digest
from lcguard.server.authorization.segment_view import shown_tokens_for
from lcguard.server.crashes import unforeseen
from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.detection.span_finder import SpanFinder
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract_fields import Endpoint
from lcguard.server.gateway.handoff_field import HandoffField, Publish
from lcguard.server.leakage.draw_budget import DrawsSpent, reserve_draw, text_of
from lcguard.server.leakage.ledger import BudgetSpent, LedgerError, find, reserve
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.store import SegmentNotFound, SegmentStore, StoreError
from lcguard.store.line import StoreLine


class Authority:
    """The policy's decisions for one deployment."""

    def __init__(
        self,
        policy: ReloadingFile[Policy] | Policy,
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
        audit: AuditLog,
        meter: LeakageMeter,
        spans: SpanFinder,
        block: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``block`` gives the reason why nothing may be published now, or nothing."""
        self._policy, self.store, self.line, self.key = policy, store, line, key
        self.audit, self.meter, self.spans = audit, meter, spans
        self.block, self.clock = block, clock

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return in_force(self._policy)

    async def open(
        self,
        who: Identity,
        handoff: HandoffField,
        endpoint: Endpoint,
        body: dict[str, Any],
        request_id: str,
    ) -> ApprovedHandoff:
        """The handoff for vLLM, audited and charged to the composition budget.

        Raises:
            ProxyError: 400 for a request that cannot be served, 403 for one that may not, 404 for
                a segment that is not there, 503 where nobody can tell. It is in the audit.
        """
        approved = ApprovedHandoff(who, request_id, {})
        try:
            if handoff.consume is not None:
                await self._consume(approved, handoff.consume)
                body = {**body, "kv_transfer_params": {"lcguard": {**approved.params}}}
            if handoff.publish is not None:
                await self._publish(approved, handoff.publish, endpoint, body)
            approved.params = signed_order(self.key, approved.params, self.clock())
            await self._allow_whole(approved)
        except ProxyError as error:
            await self._refused(approved, handoff, error)
            raise
        except Exception as error:
            found = unforeseen("a handoff's check", error)
            await self._refused(approved, handoff, found)
            raise found from None
        return approved

    async def _consume(self, approved: ApprovedHandoff, handles: Sequence[str]) -> None:
        me = qualified(approved.who.tenant, approved.who.agent)
        try:
            approved.consumed = await self.line.run(
                lambda: tuple(self.segment(h, me) for h in handles)
            )
        except StoreError as error:
            raise unavailable(error) from None
        approved.shown_tokens = tuple(
            shown_tokens_for(me, self.policy.for_edge(m.source_agent, me), m.n_tokens)
            for m in approved.consumed
        )
        until = int(self.clock() + GRANT_S)
        approved.params["consume"] = {
            "agent": me,
            "segments": [
                {"handle": m.handle, "grant": make_grant(self.key, m.handle, me, until)}
                for m in approved.consumed
            ],
        }

    def segment(self, handle: str, me: str) -> Manifest:
        """The manifest of a segment that ``me`` may consume now. Raises ``ProxyError``."""
        shown = f"segment {handle[:6]}..."
        try:
            row = self.audit.database.read(lambda connection: find(connection, handle))
            manifest = self.store.manifest(handle)
            manifest.verify(self.key)
        except SegmentNotFound:
            raise gone(shown) from None
        except (StoreError, DatabaseError) as error:
            raise unavailable(error) from None
        except SegmentError as error:
            if isinstance(error.__cause__, OSError):  # the store, not the segment
                raise unavailable(error) from None
            raise ProxyError(409, f"{shown} is damaged: {error}", code="damaged") from None
        if row is None:
            raise gone(shown)
        try:
            check_consumable(row, manifest, me, self.policy, self.meter, self.clock())
        except DatabaseError as error:
            raise unavailable(error) from None
        return manifest

    async def closed(self, edge: Edge) -> bool:
        """Whether canaries closed an edge, whichever proxy they ran beside. Raises ``ProxyError``
        (503) where nobody can tell."""
        try:
            return await asyncio.to_thread(self.meter.verdict, *edge_name(edge)) == "closed"
        except DatabaseError as error:
            raise unavailable(error) from None

    async def _publish(
        self, approved: ApprovedHandoff, publish: Publish, endpoint: Endpoint, body: dict[str, Any]
    ) -> None:
        who, canary = approved.who, approved.who.role == "canary"
        if not canary and (publish.source is not None or publish.tenant is not None):
            raise ProxyError(
                400,
                "lcguard.publish: leave out source and tenant, the key says who publishes",
                code="bad_handoff",
                param="lcguard.publish.source",
            )
        if reason := self.block():
            raise ProxyError(503, reason, code="not_ready", retry_after_s=30)
        tenant = publish.tenant or who.tenant
        source = qualified(tenant, publish.source or who.agent)
        first, *others = (qualified(tenant, name) for name in publish.audiences)
        wish = EnginePublish(
            source=source,
            audience=first,
            also=tuple(AlsoFor(audience=name) for name in others),
            forbid=publish.forbid,
            ttl_s=publish.ttl_s,
        ).named(new_handle)
        try:
            hops = hops_of(self.policy, wish, approved.consumed)
            # a canary measures the guard itself: that is what opens a closed edge again
            if not canary and await self._redacts(hops):
                wish = wish.model_copy(update={"guard": "redact"})
                hops = hops_of(self.policy, wish, approved.consumed)
            check_hops(hops, approved.consumed)
            approved.publishes = tuple(
                ApprovedPublish(
                    hop,
                    str(one.handle),
                    rule_digest(self.policy.for_edge(source, one.audience)),
                    declassified=self._declassified(hop, approved.consumed),
                )
                for one, hop in zip(wish.each(), hops, strict=True)
            )
        except HandoffError as error:
            raise ProxyError(error.status, str(error), code="policy") from None
        approved.listed, edge = publish.several, hops[0].joint
        if not canary and any(hop.own.max_draws is not None for hop in hops):
            text = await asyncio.to_thread(text_of, self.key, publish.record, body)
            approved.publishes = tuple(
                p if p.hop.own.max_draws is None else replace(p, text=text)
                for p in approved.publishes
            )
        sent = wish.model_dump(mode="json", exclude_none=True)
        if edge.guard == "redact":
            found = await self.spans.find(endpoint, body, edge, publish.secrets)
            sent["spans"], sent["tokens"] = found.spans, found.digest
            approved.n_redacted = found.n_occurrences
        elif publish.secrets is not None and not canary:
            raise ProxyError(
                400,
                f"secrets are for guard 'redact'; this edge has {edge.guard!r}: leave them out",
                code="bad_handoff",
                param="lcguard.publish.secrets",
            )
        elif edge.custom or edge.detector != "none":
            found = await self.spans.find(endpoint, body, edge, ())
            sent["told"], sent["tokens"] = found.spans, found.digest
            approved.n_redacted = found.n_occurrences
        if edge.custom:
            sent["looked_for"] = edge.definitions
        approved.params["publish"] = sent

    async def _redacts(self, hops: Sequence[Hop]) -> bool:
        """Whether guard ``redact`` takes the place of the edges' own, because canaries closed one.

        Raises ``ProxyError`` (403) for a closed edge that lets nothing pass, ``HandoffError`` for
        edges that are then guarded in different ways.
        """
        closed = [await self.closed(hop.own) for hop in hops]
        if not any(closed):
            return False
        for hop, shut in zip(hops, closed, strict=True):
            if shut and hop.own.on_leak != "redact":
                raise ProxyError(
                    403,
                    f"the edge to {split_tenant(hop.own.audience)[1]!r} is closed: planted records "
                    "were read off its segments",
                    code="edge_closed",
                )
        check_alike(
            [
                hop.alone.model_copy(update={"guard": "redact"} if shut else {})
                for hop, shut in zip(hops, closed, strict=True)
            ]
        )
        return True

    def _declassified(self, hop: Hop, consumed: Sequence[Manifest]) -> tuple[str, ...]:
        if not hop.own.declassify:
            return ()
        passed = declassified(hop.own, self.policy, consumed)
        return tuple(c for c in passed if c not in hop.joint.forbid)

    async def _allow_whole(self, approved: ApprovedHandoff) -> None:
        """``_allow``, not to be stopped half way: what the audit allowed has an end there, also
        where its client hangs up in this very moment."""
        allowing = asyncio.ensure_future(self._allow(approved))
        try:
            await asyncio.shield(allowing)
        except asyncio.CancelledError:
            await asyncio.wait([allowing])
            if allowing.exception() is None:
                reason = "the client hung up"
                rows = [consumption(approved, m, "aborted", reason) for m in approved.consumed]
                rows += publications(approved, "aborted", reason)
                with suppress(DatabaseError):
                    await self.audit.append_all(rows)
            raise

    async def _allow(self, approved: ApprovedHandoff) -> None:
        """Charges the budget and writes the audit, both or neither."""
        now, who = self.clock(), approved.who
        wanted = []
        for manifest in approved.consumed:
            edge = self.policy.for_edge(manifest.source_agent, manifest.audience)
            wanted.append((manifest, edge))

        def book(connection: Connection) -> None:
            for manifest, edge in wanted:
                reserve(
                    connection,
                    who.tenant,
                    who.agent,
                    [(manifest.handle, split_tenant(manifest.source_agent)[1])],
                    edge.max_segments,
                    edge.window_s,
                    now,
                )
                reserve_draw(
                    connection, who.tenant, who.agent, manifest.handle, edge.max_draws, now
                )

        entries = [consumption(approved, m, "consume") for m in approved.consumed]
        if (joint := approved.edge) is not None:
            own = ", ".join(joint.custom)
            said = [f"own categories looked for: {own}"] if own else []
            if len(approved.publishes) > 1:
                names = (split_tenant(p.hop.own.audience)[1] for p in approved.publishes)
                said.append(f"one publish for {', '.join(names)}")
            entries += publications(approved, "publish", "; ".join(said))
        for publish in approved.publishes:
            if publish.declassified:
                reason = f"of what was consumed: {', '.join(publish.declassified)}"
                entries.append(publication(approved, publish, "declassified", reason=reason))
        try:
            await self.audit.append_all(entries, book if wanted else None)
        except (BudgetSpent, DrawsSpent) as error:
            wait_s = None if error.frees_at_s is None else max(1.0, error.frees_at_s - now)
            raise ProxyError(403, str(error), code="budget", retry_after_s=wait_s) from None
        except LedgerError as error:
            raise ProxyError(404, str(error), code="no_segment") from None
        except DatabaseError as error:
            raise unavailable(error) from None

    async def _refused(
        self, approved: ApprovedHandoff, handoff: HandoffField, error: ProxyError
    ) -> None:
        """A refusal is audited too; where that fails it is still a refusal."""
        handles = handoff.consume or ("",)
        to = handoff.publish.audiences if handoff.publish else (approved.who.agent,)
        entries = [
            Entry(
                request_id=approved.request_id,
                event="refused",
                tenant=approved.who.tenant,
                agent=approved.who.agent,
                source=approved.who.agent if handoff.publish else "",
                audience=audience,
                handle=handles[0],
                verdict="blocked" if error.status < 500 else "error",
                reason=f"{error.code}: {error.message}",
            )
            for audience in to
        ]
        try:
            await self.audit.append_all(entries)
        except DatabaseError:
            if error.status < 500:
                raise unavailable(DatabaseError("the audit cannot be written")) from None
