"""A key on every route of vLLM's server.

    vllm serve MODEL --middleware lcguard.vllm.authentication.AuthenticationMiddleware

vLLM asks for its key under ``/v1``, ``/v2``, ``/inference`` and ``/cohere`` alone. ``/invocations``
generates too, ``/tokenize`` and ``/pause`` act, ``/metrics`` counts other agents' prefix-cache
hits, and a later release may add more: here all but ``/health`` is closed.
"""

from __future__ import annotations

import hmac
import os

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

KEY_VARIABLE = "VLLM_API_KEY"
OPEN = "/health"
"""Says nothing but that the server lives."""


class AuthenticationMiddleware:
    """ASGI middleware. Without a key in ``VLLM_API_KEY`` nobody gets in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._key = app, os.environ.get(KEY_VARIABLE, "").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
        else:
            reason = "this engine takes requests from its proxy alone, which has the key"
            body = {"error": {"message": reason, "type": "Unauthorized", "code": 401}}
            await JSONResponse(body, 401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] == OPEN and scope["method"] in ("GET", "HEAD"):
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # compared even where there is no key: an empty one must let nobody in
        same = hmac.compare_digest(given.encode("latin-1", "replace"), self._key)
        return bool(self._key) and scheme.lower() == "bearer" and same
