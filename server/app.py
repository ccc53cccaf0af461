"""The proxy as an ASGI application."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from lcguard import __version__
from lcguard.server.access.roles import operator
from lcguard.server.crashes import Crashes
from lcguard.server.dashboard.overview import overview
from lcguard.server.dashboard.page import headers as dashboard_headers
from lcguard.server.dashboard.page import new_nonce, render
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.contract_fields import PATHS
from lcguard.server.gateway.relay import Relay
from lcguard.server.health.routes import router as health
from lcguard.server.openapi import openapi
from lcguard.server.routes import router
from lcguard.server.state import Proxy
from lcguard.server.text_routes import router as text

Lifespan = Callable[[], AbstractAsyncContextManager[Proxy]]


def make_app(lifespan: Lifespan) -> FastAPI:
    """``lifespan`` opens what the proxy needs, and closes it."""

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan() as proxy:
            app.state.proxy = proxy
            # what was imported stays: looking through it again would hold up requests
            gc.collect()
            gc.freeze()
            yield

    app = FastAPI(
        title="LCGuard proxy",
        version=__version__,
        lifespan=live,
        # their pages would load scripts from another host
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(health)
    app.include_router(router)
    app.include_router(text)
    for endpoint, path in PATHS.items():
        # before the others: a request tries the routes one by one
        app.router.routes.insert(0, Route(path, _Relayed(endpoint, path), methods=["POST"]))
    app.add_api_route("/", root, include_in_schema=False, response_class=Response)
    app.add_api_route("/dashboard", dashboard, include_in_schema=False, response_class=Response)
    app.add_exception_handler(ProxyError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Crashes)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


class _Relayed:
    """A generating route: made when the proxy is there."""

    def __init__(self, endpoint: Any, path: str) -> None:
        self.endpoint, self.path = endpoint, path
        self._relay: Relay | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._relay is None:
            self._relay = Relay(scope["app"].state.proxy, self.endpoint, self.path)
        await self._relay(scope, receive, send)


async def root(request: Request) -> Response:
    """Whoever opens the address that `lcguard serve` prints is led to the page for people."""
    return RedirectResponse("/dashboard")


async def dashboard(request: Request) -> Response:
    """The page for people; a browser asks for the key as the password of any user."""
    proxy: Proxy = request.app.state.proxy
    try:
        who = proxy.authenticate_basic(request.headers)
        tenant = who.tenant if who.role == "auditor" else ""
        if not tenant:
            operator(who)
    except ProxyError as error:
        # A challenge to the page's own refresh would hang it behind a dialog.
        whole = request.headers.get("sec-fetch-dest", "document") == "document"
        realm = 'Basic realm="LCGuard: any user, an admin or auditor key as password"'
        challenge = {"WWW-Authenticate": realm} if whole and error.status == 401 else None
        return JSONResponse(error.body(), error.status, challenge)
    nonce = new_nonce()
    page = render(await overview(proxy, tenant), nonce)
    return Response(page, media_type="text/html; charset=utf-8", headers=dashboard_headers(nonce))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProxyError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    found = ProxyError(400, f"{where}: {first['msg']}", code="bad_request", param=where)
    return await _refused(request, found)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ProxyError(
        error.status_code,
        f"{request.method} {request.url.path[:100]}: {error.detail}",
        code="no_route",
    )
    answer = await _refused(request, found)
    answer.headers.update(error.headers or {})
    return answer
