"""What is written of an error that nobody foresaw: where it happened, never what it says.

Its message may quote a request: pydantic's, a template's and a tokenizer's do.
"""

from __future__ import annotations

import logging
import traceback

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcguard.server.errors import ProxyError

logger = logging.getLogger("lcguard.server")


def unforeseen(where: str, error: BaseException) -> ProxyError:
    """Logs the places that ``error`` came through; returns what the client is told."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("%s failed with %s:\n%s", where, type(error).__name__, frames)
    return ProxyError(500, "an error of the proxy; its log has the place", code="internal")


class Crashes:
    """Answers for routes that fail. Starlette would hand the error on, to be logged whole."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if scope["type"] != "http":  # a start that failed is for the server to say
                raise
            found = unforeseen(getattr(scope.get("endpoint"), "__name__", "a route"), error)
            if not begun:
                await JSONResponse(found.body(), found.status)(scope, receive, send)
