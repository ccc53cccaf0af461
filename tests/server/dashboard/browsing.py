"""A server of the dashboard and a browser before it."""

from __future__ import annotations

import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response

from lcguard.server.dashboard.page import (
    DashboardView,
    headers,
    new_nonce,
    render,
)
from tests.server.dashboard.views import FRESH

Open = Callable[..., Any]
REFRESH_S = 0.2


# In a browser.


@dataclass
class Site:
    """A server whose view a test can change, stop and start."""

    view: DashboardView = FRESH
    status: int = 200
    key: bytes = b""
    """User and password, where the page asks for one."""
    server: Any = None
    thread: threading.Thread | None = None
    port: int = 0

    def start(self) -> None:
        app = FastAPI()

        @app.get("/dashboard")
        def page(request: Request) -> Response:
            if self.key and b64decode(request.headers.get("authorization", "")[6:]) != self.key:
                # to the page's own refresh no challenge: the browser would open a dialog
                first = request.headers.get("sec-fetch-dest") == "document"
                challenge = {"www-authenticate": 'Basic realm="any user, a key"'}
                return Response("", 401, challenge if first else {})
            nonce = new_nonce()
            text = render(self.view, nonce, REFRESH_S)
            return Response(text, self.status, headers(nonce))

        config = uvicorn.Config(app, "127.0.0.1", self.port, log_level="error", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        assert self.thread is not None
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/dashboard"


def _ours(url: str, site: Site) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "data" or (parts.hostname, parts.port) == ("127.0.0.1", site.port)
