"""Who may ask what: the dependencies of the routes that do not generate."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from lcguard.server.access.keyring import Identity
from lcguard.server.errors import ProxyError
from lcguard.server.state import Proxy


def proxy_of(request: Request) -> Proxy:
    """The running proxy."""
    found: Proxy = request.app.state.proxy
    return found


def caller(request: Request) -> Identity:
    """Who asks. Raises ``ProxyError`` (401)."""
    return proxy_of(request).authenticate(request.headers)


def operator(who: Annotated[Identity, Depends(caller)]) -> Identity:
    """An admin. Raises ``ProxyError`` (403)."""
    if who.role != "admin":
        raise ProxyError(403, f"this takes an admin's key, not an {who.role}'s", code="role")
    return who


Running = Annotated[Proxy, Depends(proxy_of)]
Caller = Annotated[Identity, Depends(caller)]
Operator = Annotated[Identity, Depends(operator)]
