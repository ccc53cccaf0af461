"""What agents and operators ask beside answers: segments, policy, leakage, contract, models."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from lcguard.handoff.names import ANY, HandleName, KeyName
from lcguard.handoff.policy import Edge
from lcguard.manifest import SegmentError
from lcguard.server.access.keyring import Identity
from lcguard.server.access.roles import Caller, Operator, Running
from lcguard.server.audit.trail import Entry
from lcguard.server.authorization.approved_handoff import gone, unavailable
from lcguard.server.authorization.segment_view import knows_text, ledger_view, manifest_view
from lcguard.server.dashboard.overview import edge_rows
from lcguard.server.database.connection import DatabaseError
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.body import ClientGone, parse_object, read_body
from lcguard.server.gateway.contract import describe
from lcguard.server.leakage.edge_state import LeakageError
from lcguard.server.leakage.ledger import Segment, find, live, revoke
from lcguard.server.state import Proxy
from lcguard.store import StoreError

router = APIRouter()


class EdgeName(BaseModel):
    """One hop."""

    model_config = ConfigDict(extra="forbid")
    tenant: KeyName
    source: KeyName
    audience: KeyName


_EDGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": EdgeName.model_json_schema()}},
    }
}


@router.get("/v1/models", tags=["openai"], response_class=Response)
async def models(proxy: Running, who: Caller) -> Response:
    """vLLM's models that the caller's key is for."""
    status, data = await proxy.upstream.get("/v1/models")
    if status == 200 and who.models:
        found = json.loads(data)
        found["data"] = [m for m in found["data"] if m["id"] in who.models]
        data = json.dumps(found).encode()
    return Response(data, status, media_type="application/json")


@router.api_route(
    "/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False
)
async def kept_response(rest: str, who: Caller) -> None:
    """Whatever names an earlier response, or counts and compacts what OpenAI keeps of one."""
    raise ProxyError(
        404,
        "no response is kept here, so that none can be read, cancelled or deleted: send the "
        "conversation's items as input, and hang up to end an answer",
        code="not_kept",
    )


@router.get("/lcguard/v1/contract", tags=["lcguard"])
async def contract(who: Caller) -> dict[str, Any]:
    """What becomes of each field of a request."""
    return describe()


@router.get("/lcguard/v1/policy", tags=["lcguard"])
async def policy(proxy: Running, who: Caller) -> dict[str, Any]:
    """The rules that concern the caller; all of them for an admin. Of the policy's own categories
    how many terms and patterns each has: which, nobody is shown."""
    found = proxy.authority.policy

    def concerns(edge: Edge) -> bool:
        if who.role == "admin":
            return True
        mine = edge.tenant in (ANY, who.tenant)
        return mine and (
            who.role == "auditor" or {edge.source, edge.audience} & {ANY, who.agent} != set()
        )

    return {
        "digest": found.digest,
        "error": proxy.policy_error(),
        "default": "every category is forbidden on an edge that no rule matches",
        "edges": [e.model_dump(mode="json") for e in found.edges if concerns(e)],
        "categories": {
            tenant: {name: category.size for name, category in found.custom_of(tenant).items()}
            for tenant in ((ANY, *found.tenants) if who.role == "admin" else (who.tenant,))
        },
    }


@router.get("/lcguard/v1/segments", tags=["lcguard"])
async def segments(proxy: Running, who: Caller) -> dict[str, Any]:
    """Live segments that the caller published or may consume; its tenant's for other roles."""
    rows = await asyncio.to_thread(
        proxy.database.read, lambda c: live(c, who.tenant, proxy.authority.clock())
    )
    found = proxy.authority.policy
    return {"data": [ledger_view(who, s, found) for s in rows if _may_see(who, s)]}


@router.get("/lcguard/v1/segments/{handle}", tags=["lcguard"])
async def segment(handle: HandleName, proxy: Running, who: Caller) -> dict[str, Any]:
    """What the caller may know of a segment; its manifest was verified."""
    row = await _own(proxy, who, handle)
    try:
        manifest = await proxy.line.run(proxy.store.manifest, handle)
        manifest.verify(proxy.key)
    except StoreError as error:
        raise unavailable(error) from None
    except SegmentError:
        raise gone(f"segment {handle[:6]}...") from None
    return {
        **ledger_view(who, row, proxy.authority.policy),
        "manifest": manifest_view(row, manifest),
    }


@router.delete("/lcguard/v1/segments/{handle}", tags=["lcguard"])
async def revoke_segment(
    handle: HandleName,
    proxy: Running,
    who: Caller,
    cascade: Annotated[bool, Query(description="Also what was published on top of it.")] = False,
) -> dict[str, Any]:
    """Revokes: nobody consumes it from now on, whatever a prefix cache still holds, and what is
    being answered from it ends."""
    row = await _own(proxy, who, handle)
    if who.role == "auditor" or (who.role == "agent" and who.agent != row.source):
        raise ProxyError(403, "only its publisher or an admin revokes a segment", code="role")
    revoked: list[str] = []
    entry = Entry(
        "revoked",
        tenant=row.tenant,
        agent=who.agent,
        source=row.source,
        audience=row.audience,
        handle=handle,
        reason="with all on top of it" if cascade else "",
    )
    try:
        await proxy.audit.append(
            entry, lambda c: revoked.extend(revoke(c, handle, proxy.authority.clock(), cascade))
        )
    except DatabaseError as error:
        raise unavailable(error) from None
    ended = proxy.active_reads.end(revoked)
    kept = await _delete(proxy, revoked)
    return {"revoked": revoked, "ended_requests": ended, "still_in_store": kept}


@router.get("/lcguard/v1/leakage", tags=["lcguard"])
async def leakage(proxy: Running, who: Caller) -> dict[str, Any]:
    """What canaries lost on each edge, and what audiences have accumulated."""
    rows = await asyncio.to_thread(edge_rows, proxy)
    seen = [r for r in rows if who.role == "admin" or r.tenant == who.tenant]
    if who.role == "agent":
        seen = [r for r in seen if who.agent in (r.source, r.audience)]
    # how long publishing took tells how long the text was
    seen = [
        r if knows_text(who, r.source) else replace(r, publish_p50_ms=None, publish_p95_ms=None)
        for r in seen
    ]
    return {"threshold": proxy.settings.canaries.threshold, "edges": [asdict(r) for r in seen]}


@router.post("/lcguard/v1/leakage/reopen", tags=["lcguard"], openapi_extra=_EDGE_BODY)
async def reopen(request: Request, proxy: Running, who: Operator) -> dict[str, str]:
    """Opens an edge that canaries closed, on an operator's word."""
    edge = await _edge_name(request, proxy)
    try:
        name = (edge.tenant, edge.source, edge.audience)
        await asyncio.to_thread(proxy.meter.reopen, name, who.agent)
    except KeyError:
        raise ProxyError(
            404, f"{edge.source} -> {edge.audience} has no record", code="no_edge"
        ) from None
    except (DatabaseError, LeakageError) as error:
        raise unavailable(error) from None
    try:
        await proxy.audit.append(
            Entry(
                "edge_opened",
                tenant=edge.tenant,
                agent=who.agent,
                source=edge.source,
                audience=edge.audience,
                reason="by an operator",
            )
        )
    except DatabaseError as error:
        raise unavailable(error) from None
    return {"state": "open"}


@router.post("/lcguard/v1/canaries", tags=["lcguard"], status_code=202)
async def plant(proxy: Running, who: Operator, background: BackgroundTasks) -> dict[str, str]:
    """Screens every edge now, behind a run that is in progress."""
    if proxy.canaries is None:
        raise ProxyError(409, "canaries are switched off: set canaries.enabled", code="canaries")
    background.add_task(proxy.canaries.run_now)
    return {"status": "started"}


async def _edge_name(request: Request, proxy: Proxy) -> EdgeName:
    """The body. FastAPI would read it before it asks for a key, of any size and for any time."""
    limits, headers = proxy.settings.limits, dict(request.headers)
    try:
        raw = await read_body(
            request.receive, headers, limits.max_body_bytes, limits.body_timeout_s
        )
        return EdgeName.model_validate(parse_object(raw, headers))
    except ClientGone:
        raise ProxyError(400, "the body ended too early", code="bad_json") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ProxyError(400, f"{where}: {first['msg']}", code="bad_request", param=where) from None


def _may_see(who: Identity, row: Segment) -> bool:
    if who.role == "admin":
        return True
    return row.tenant == who.tenant and (
        who.role == "auditor" or who.agent in (row.source, row.audience)
    )


async def _own(proxy: Proxy, who: Identity, handle: str) -> Segment:
    """The segment's row, if the caller may know of it. Raises ``ProxyError`` (404, 503)."""
    try:
        row = await asyncio.to_thread(proxy.database.read, lambda c: find(c, handle))
    except DatabaseError as error:
        raise unavailable(error) from None
    if row is None or row.revoked_at_s is not None or not _may_see(who, row):
        raise gone(f"segment {handle[:6]}...")
    return row


async def _delete(proxy: Proxy, handles: list[str]) -> list[str]:
    """From the store; returns those that it would not let go, which are dead all the same."""
    kept = []
    for i, handle in enumerate(handles):
        try:
            await proxy.line.run(proxy.store.delete, handle)
        except SegmentError:
            kept.append(handle)
        except StoreError:  # it would keep the others waiting as long, one after the other
            return kept + handles[i:]
    return kept
