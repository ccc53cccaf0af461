"""Says after vLLM's answer what a handoff came to: in the audit, in the ledger, and to the client.

The segment is looked at where it lies: what was stored counts, not what was ordered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lcguard.handoff.names import split_tenant
from lcguard.manifest import Manifest, SegmentError
from lcguard.server.audit.trail import AuditLog, Entry, Event
from lcguard.server.authorization.approved_handoff import (
    ApprovedHandoff,
    ApprovedPublish,
    consumption,
    publication,
    publications,
    unavailable,
)
from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.errors import ProxyError
from lcguard.server.leakage.draw_budget import record_of
from lcguard.server.leakage.ledger import LedgerError, Segment, record_segment
from lcguard.store import SegmentNotFound, SegmentStore, StoreError
from lcguard.store.line import StoreLine


class Settlement:
    """Ends the handoffs of one deployment."""

    def __init__(
        self,
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
        audit: AuditLog,
        unproven: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``unproven``: guard to why nothing shows that it withholds anything."""
        self.unproven = unproven or {}
        self.store, self.line, self.key = store, line, key
        self.audit, self.clock = audit, clock

    async def finish(self, approved: ApprovedHandoff) -> dict[str, Any]:
        """What was applied, for the client, after vLLM has answered; written to the audit.

        Raises ``ProxyError`` (502, 503) where the segment is not what was ordered: it is then
        deleted.
        """
        answer: dict[str, Any] = {}
        entries: list[Entry] = []
        stored: list[tuple[ApprovedPublish, Manifest]] = []
        try:
            if approved.consumed:
                answer["consumed"] = [
                    _shown(m, n)
                    for m, n in zip(approved.consumed, approved.shown_tokens, strict=True)
                ]
                entries += [consumption(approved, m, "consumed") for m in approved.consumed]
            for publish in approved.publishes:
                stored.append((publish, await self.line.run(self._stored, publish)))
            entries += [publication(approved, p, "published", m) for p, m in stored]
            if made := [self._describe(approved, p, m) for p, m in stored]:
                answer["published"] = made if approved.listed else made[0]
            await self.audit.append_all(entries, self._recorder(approved, stored))
        except (DatabaseError, LedgerError, StoreError) as error:
            await self.fail(approved, "failed", str(error))
            raise unavailable(error) from None
        except ProxyError as error:
            await self.fail(approved, "failed", error.message)
            raise
        approved.done = True
        return answer

    async def fail(self, approved: ApprovedHandoff, event: Event, reason: str) -> None:
        """A handoff that did not come about (``failed``) or whose client left (``aborted``)."""
        if approved.done:
            return
        approved.done = True
        for publish in approved.publishes:
            # vLLM may be about to store it: nothing can be put there any more
            with suppress(StoreError, SegmentError):  # in no ledger: nobody can consume it
                await self.line.run(self.store.retire, publish.handle)
        entries = [consumption(approved, m, event, reason) for m in approved.consumed]
        entries += publications(approved, event, reason)
        try:
            await self.audit.append_all(entries)
        except DatabaseError:
            # the row that allowed it is there; its missing end says that it did not come about
            pass

    def _stored(self, publish: ApprovedPublish) -> Manifest:
        """The manifest of what vLLM stored. Raises ``ProxyError`` unless it is what was ordered."""
        edge = publish.hop.alone
        try:
            manifest = self.store.manifest(publish.handle)
            manifest.check(
                self.key,
                {
                    "handle": publish.handle,
                    "audience": edge.audience,
                    "source_agent": edge.source,
                    "policy_digest": edge.digest,
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

    def _recorder(
        self, approved: ApprovedHandoff, stored: Sequence[tuple[ApprovedPublish, Manifest]]
    ) -> Callable[[Connection], None] | None:
        # a canary's segment is in no ledger: nobody can consume it, not even its audience
        if not stored or approved.who.role == "canary":
            return None
        now_s = self.clock()

        def write(connection: Connection) -> None:
            for publish, manifest in stored:
                row = self._row(approved, publish, manifest, now_s)
                if row.draw:
                    place = row.tenant, row.source, row.audience
                    record = record_of(connection, *place, publish.text, now_s)
                    row = replace(row, record=record)
                record_segment(connection, row)

        return write

    def _row(
        self, approved: ApprovedHandoff, publish: ApprovedPublish, manifest: Manifest, now_s: float
    ) -> Segment:
        """The ledger's, of one audience's segment."""
        tenant, source = split_tenant(manifest.source_agent)
        return Segment(
            handle=manifest.handle,
            tenant=tenant,
            source=source,
            audience=split_tenant(manifest.audience)[1],
            created_at_s=now_s,
            expires_at_s=manifest.expires_at_s,
            n_tokens=manifest.n_tokens,
            guard=publish.hop.joint.guard,
            guard_digest=manifest.guard_digest,
            policy_digest=publish.rule,
            parents=tuple(m.handle for m in approved.consumed),
            draw=manifest.draw,
        )

    def _describe(
        self, approved: ApprovedHandoff, publish: ApprovedPublish, manifest: Manifest
    ) -> dict[str, Any]:
        edge = publish.hop.joint
        return {
            **_shown(manifest, manifest.n_tokens),
            "audience": split_tenant(edge.audience)[1],
            "expires_at_s": manifest.expires_at_s,
            "guard": edge.guard,
            "forbid": list(edge.forbid),
            "derive": list(edge.derive),
            **({} if approved.n_redacted is None else {"redacted_spans": approved.n_redacted}),
            **({"unproven": why} if (why := self.unproven.get(edge.guard)) else {}),
        }


def _shown(m: Manifest, n_tokens: int) -> dict[str, Any]:
    return {
        "handle": m.handle,
        "source": split_tenant(m.source_agent)[1],
        "n_tokens": n_tokens,
        "guard_digest": m.guard_digest,
        "policy_digest": m.policy_digest,
    }
