"""Says after vLLM's answer what a handoff came to: in the audit, in the ledger, and to the client.

The segment is looked at where it lies: what was stored counts, not what was ordered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from sqlite3 import Connection
from typing import Any

from lcguard.handoff.gatekeeper import edge_digest
from lcguard.handoff.names import split_tenant
from lcguard.manifest import Manifest, SegmentError
from lcguard.server.audit.trail import AuditLog, Entry, Event
from lcguard.server.authorization.approved_handoff import (
    Order,
    consumption,
    publication,
    unavailable,
)
from lcguard.server.database.writer import DatabaseError
from lcguard.server.errors import ProxyError
from lcguard.server.leakage.draw_budget import record_of
from lcguard.server.leakage.ledger import LedgerError, Segment, record_segment
from lcguard.store import SegmentNotFound, SegmentStore, StoreError
from lcguard.store.line import StoreLine


class Settlement:
    """Ends the orders of one deployment."""

    def __init__(
        self,
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
        audit: AuditLog,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.line, self.key = store, line, key
        self.audit, self.clock = audit, clock

    async def finish(self, order: Order) -> dict[str, Any]:
        """What was applied, for the client, after vLLM has answered; written to the audit.

        Raises ``ProxyError`` (502, 503) where the segment is not what was ordered: it is then
        deleted.
        """
        answer: dict[str, Any] = {}
        entries: list[Entry] = []
        manifest = None
        try:
            if order.consumed:
                answer["consumed"] = [
                    _shown(m, n) for m, n in zip(order.consumed, order.shown_tokens, strict=True)
                ]
                entries += [consumption(order, m, "consumed") for m in order.consumed]
            if order.edge is not None:
                manifest = await self.line.run(self._stored, order)
                answer["published"] = self._describe(order, manifest)
                entries.append(publication(order, "published", manifest))
            await self.audit.append_all(entries, self._recorder(order, manifest))
        except (DatabaseError, LedgerError, StoreError) as error:
            await self.fail(order, "failed", str(error))
            raise unavailable(error) from None
        except ProxyError as error:
            await self.fail(order, "failed", error.message)
            raise
        order.done = True
        return answer

    async def fail(self, order: Order, event: Event, reason: str) -> None:
        """A handoff that did not come about (``failed``) or whose client left (``aborted``)."""
        if order.done:
            return
        order.done = True
        if order.handle:
            # vLLM may be about to store it: nothing can be put there any more
            with suppress(StoreError, SegmentError):  # in no ledger: nobody can consume it
                await self.line.run(self.store.retire, order.handle)
        entries = [consumption(order, m, event, reason) for m in order.consumed]
        if order.edge is not None:
            entries.append(publication(order, event, reason=reason))
        try:
            await self.audit.append_all(entries)
        except DatabaseError:
            # the row that allowed it is there; its missing end says that it did not come about
            pass

    def _stored(self, order: Order) -> Manifest:
        """The manifest of what vLLM stored. Raises ``ProxyError`` unless it is what was ordered."""
        edge = order.edge
        assert edge is not None
        try:
            manifest = self.store.manifest(order.handle)
            manifest.check(
                self.key,
                expect={
                    "handle": order.handle,
                    "audience": edge.audience,
                    "source_agent": edge.source,
                    "policy_digest": edge_digest(edge),
                },
            )
        except SegmentNotFound:
            raise ProxyError(
                502,
                "vLLM stored no segment: its guard or its store failed, see its log; nothing "
                "was handed over",
                code="not_stored",
            ) from None
        except SegmentError as error:
            if isinstance(error.__cause__, OSError):
                raise unavailable(error) from None
            raise ProxyError(
                502,
                f"vLLM stored another segment than was ordered: {error}; it was deleted",
                code="wrong_segment",
            ) from None
        except StoreError as error:
            raise unavailable(error) from None
        if not manifest.guard_digest:
            raise ProxyError(
                502, "vLLM stored a segment without a guard; it was deleted", code="wrong_segment"
            )
        return manifest

    def _recorder(self, order: Order, manifest: Manifest | None) -> Any:
        # a canary's segment is in no ledger: nobody can consume it, not even its audience
        if manifest is None or order.who.role == "canary":
            return None
        tenant, source = split_tenant(manifest.source_agent)
        row = Segment(
            handle=manifest.handle,
            tenant=tenant,
            source=source,
            audience=split_tenant(manifest.audience)[1],
            created_at_s=self.clock(),
            expires_at_s=manifest.expires_at_s,
            n_tokens=manifest.n_tokens,
            guard=order.edge.guard if order.edge else "",
            guard_digest=manifest.guard_digest,
            policy_digest=order.rule,
            parents=tuple(m.handle for m in order.consumed),
            draw=manifest.draw,
        )

        def write(connection: Connection) -> None:
            record = ""
            if row.draw:
                record = record_of(
                    connection, row.tenant, row.source, row.audience, order.text, self.clock()
                )
            record_segment(connection, replace(row, record=record))

        return write

    def _describe(self, order: Order, manifest: Manifest) -> dict[str, Any]:
        edge = order.edge
        assert edge is not None
        return {
            **_shown(manifest, manifest.n_tokens),
            "audience": split_tenant(edge.audience)[1],
            "expires_at_s": manifest.expires_at_s,
            "guard": edge.guard,
            "forbid": list(edge.forbid),
            "derive": list(edge.derive),
            **({} if order.n_redacted is None else {"redacted_spans": order.n_redacted}),
        }


def _shown(m: Manifest, n_tokens: int) -> dict[str, Any]:
    return {
        "handle": m.handle,
        "source": split_tenant(m.source_agent)[1],
        "n_tokens": n_tokens,
        "guard_digest": m.guard_digest,
        "policy_digest": m.policy_digest,
    }
