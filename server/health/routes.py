"""For orchestrators and Prometheus: alive, ready, measured."""

from __future__ import annotations

import asyncio
import json

from fastapi import APIRouter, Request, Response

from lcguard.server.access.roles import Running, caller
from lcguard.server.dashboard.overview import refresh_metrics
from lcguard.server.errors import ProxyError

router = APIRouter()


@router.get("/livez", tags=["health"])
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@router.get("/readyz", tags=["health"], responses={503: {"description": "Not ready, and why."}})
async def readyz(proxy: Running) -> Response:
    """200 once engine, guards and policy were seen to work together."""
    state = proxy.readiness
    body = {
        "ready": state.ready,
        "checks": {c.name: {"ok": c.ok, "detail": c.detail} for c in state.conditions.values()},
        "reasons": state.reasons(),
        "unproven": proxy.unproven,
    }
    return Response(json.dumps(body), 200 if state.ready else 503, media_type="application/json")


@router.get("/metrics", tags=["health"], response_class=Response)
async def metrics(request: Request, proxy: Running) -> Response:
    """In Prometheus' format. Edges and tokens for an admin's key alone, the rest for an auditor's,
    or for everybody where ``metrics_auth`` is off."""
    known = "authorization" in request.headers or proxy.settings.metrics_auth
    role = caller(request).role if known else ""
    if proxy.settings.metrics_auth and role not in ("admin", "auditor"):
        raise ProxyError(
            403, f"metrics take an admin's or an auditor's key, not an {role}'s", code="role"
        )
    await asyncio.to_thread(refresh_metrics, proxy)
    text = proxy.metrics.text(details=role == "admin")
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
