"""Refusals of a handoff, with the HTTP status that a server answers."""

from __future__ import annotations

from http import HTTPStatus


class HandoffError(ValueError):
    """A request that must not be served. One line: what was found, and the fix."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """400: malformed; 403: not allowed; 404: no such segment; 503: nobody can tell now."""


class StartError(ValueError):
    """An engine that must not start with the connector. One line with the fix."""


def as_http(error: HandoffError) -> Exception:
    """vLLM's exception that its server answers with the error's status and reason."""
    from vllm.exceptions import GracefulHTTPError

    made: Exception = GracefulHTTPError(f"lcguard: {error}", HTTPStatus(error.status))
    return made


NOT_STORED = (
    "the segment was not stored: the guard or the store failed, see the engine's log; nothing was "
    "handed over"
)
"""Why a publish without a segment failed, as a client may read it."""
