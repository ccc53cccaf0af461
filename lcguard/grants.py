"""Handles and grants: who may consume which segment, until when.

A handle is a random name, unguessable and never used twice. It is no permission: a receiver also
shows a *grant*, the deployment's HMAC over handle, audience and expiry, which the publisher gets
and passes on with the handle. Only the audience of the grant can use it, and nobody after expiry.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from lcguard.keys import check_key
from lcguard.rope import canonical

_DOMAIN = b"lcguard grant\0"
_GRANT = re.compile(r"(0|[1-9][0-9]{0,11})\.([0-9a-f]{64})")


class GrantError(PermissionError):
    """A grant that does not cover what is asked. One line, without the right HMAC."""


def new_handle() -> str:
    """192 random bits, URL-safe."""
    return secrets.token_urlsafe(24)


def make_grant(key: bytes, handle: str, audience: str, expires_at_s: int) -> str:
    """``EXPIRY.HMAC``, to be shown by ``audience`` with ``handle`` until ``expires_at_s``."""
    return f"{expires_at_s}.{_mac(key, handle, audience, expires_at_s)}"


def check_grant(key: bytes, handle: str, audience: str, grant: str, now_s: float) -> None:
    """Raises ``GrantError`` unless ``grant`` lets ``audience`` consume ``handle`` now."""
    match = _GRANT.fullmatch(grant)
    if match is None:
        raise GrantError(
            f"grant {grant[:8]!r}... is malformed: pass the one that the publish answered with"
        )
    expires_at_s, mac = int(match[1]), match[2]
    if not hmac.compare_digest(mac, _mac(key, handle, audience, expires_at_s)):
        raise GrantError(f"the grant does not let agent {audience!r} consume this handle")
    if now_s >= expires_at_s:
        raise GrantError(f"the grant expired at Unix time {expires_at_s}: publish again")


def _mac(key: bytes, handle: str, audience: str, expires_at_s: int) -> str:
    message = _DOMAIN + canonical([handle, audience, expires_at_s])
    return hmac.new(check_key(key), message, hashlib.sha256).hexdigest()
