"""Errors of an engine with the connector, and refusals in the form that vLLM answers."""

from __future__ import annotations

from http import HTTPStatus

from lcguard.handoff.errors import HandoffError


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
