"""A refusal, in the shape of OpenAI's errors."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any


class ProxyError(Exception):
    """An answer with ``status`` that is not vLLM's; the message is one line with the fix.

    ``message`` is our own wording: it goes to the audit and to logs. ``detail`` is what others say,
    vLLM, a template or a library, who may quote the request: it goes to the client alone.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        detail: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.detail = detail
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s
        """Sent as ``Retry-After``, rounded up."""

    @property
    def whole(self) -> str:
        """With the detail: for the client, and for errors of requests of our own."""
        return f"{self.message}: {self.detail}" if self.detail else self.message

    def headers(self) -> dict[str, str]:
        """What the client is told besides."""
        out = {}
        if self.retry_after_s is not None:
            out["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            out["www-authenticate"] = "Bearer"
        return out

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {
            "error": {
                "message": self.whole,
                "type": HTTPStatus(self.status).phrase.lower().replace(" ", "_"),
                "param": self.param,
                "code": self.code,
            }
        }
