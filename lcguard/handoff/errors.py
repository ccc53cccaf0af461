"""Refusals of a handoff, with the HTTP status that a server answers."""

from __future__ import annotations


class HandoffError(ValueError):
    """A request that must not be served. One line: what was found, and the fix."""

    def __init__(self, status: int, message: str, param: str = "") -> None:
        super().__init__(message)
        self.status = status
        """400: malformed; 403: not allowed; 404: no such segment; 503: nobody can tell now."""
        self.param = param
        """The key at fault, where one is."""


class _Forbidden(HandoffError):
    """403: well-formed, and not allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(403, message)


class GrantError(_Forbidden):
    """A grant that does not cover what is asked. One line, without the right HMAC."""


class LineageError(_Forbidden):
    """What may not be passed on under the rules of what it stands on. One line with the fix."""
