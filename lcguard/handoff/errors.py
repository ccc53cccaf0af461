"""Refusals of a handoff, with the HTTP status that a server answers."""

from __future__ import annotations


class HandoffError(ValueError):
    """A request that must not be served. One line: what was found, and the fix."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """400: malformed; 403: not allowed; 404: no such segment; 503: nobody can tell now."""
