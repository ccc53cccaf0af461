"""A refusal, in the shape of OpenAI's errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class ProxyError(Exception):
    """An answer with ``status`` that is not vLLM's; the message is one line with the fix."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s
        """Sent as ``Retry-After``, rounded up."""

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {
            "error": {
                "message": self.message,
                "type": HTTPStatus(self.status).phrase.lower().replace(" ", "_"),
                "param": self.param,
                "code": self.code,
            }
        }
