"""Handles, grants and signed orders: who may consume which segment, until when.

A handle is a random name, unguessable and never used twice. It is no permission: a receiver also
shows a *grant*, the deployment's HMAC over handle, audience and expiry, which the publisher gets
and passes on with the handle. Only the audience of the grant can use it, and nobody after expiry.
An *order* is one handoff that the proxy allowed, signed, for engines that take no others. A *scan*
is the engine's own word on a prompt in which its guard has looked for secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from lcguard.canonical import canonical_hmac, check_key
from lcguard.handoff.errors import GrantError

_DOMAIN = b"lcguard grant\0"
_ORDER_DOMAIN = b"lcguard order\0"
_SCAN_DOMAIN = b"lcguard scan\0"
_GRANT = re.compile(r"(0|[1-9][0-9]{0,11})\.([0-9a-f]{64})")


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


def sign_order(key: bytes, order: bytes, expires_at_s: int) -> str:
    """``EXPIRY.HMAC`` by which an engine knows that the proxy has allowed ``order``, the canonical
    JSON of one request's handoff."""
    return f"{expires_at_s}.{_order_mac(key, order, expires_at_s)}"


def check_order(key: bytes, order: bytes, signature: str, now_s: float) -> None:
    """Raises ``GrantError`` unless the proxy signed exactly this order, a while ago at most."""
    match = _GRANT.fullmatch(signature)
    expires_at_s = int(match[1]) if match else 0
    if match is None or not hmac.compare_digest(match[2], _order_mac(key, order, expires_at_s)):
        raise GrantError(
            "this engine takes handoffs from its proxy alone, and the proxy signed another one or "
            "none: ask the proxy"
        )
    if now_s >= expires_at_s:
        raise GrantError(f"the proxy's signature expired at Unix time {expires_at_s}: ask it again")


def sign_scan(key: bytes, rule: str, ids: Sequence[int], expires_at_s: int) -> str:
    """``EXPIRY.HMAC``: the engine's own word that a prompt was read by the guard of ``rule``, the
    digest of an edge, and that ``ids`` are what is left of it with all that was found covered."""
    return f"{expires_at_s}.{_scan_mac(key, rule, ids, expires_at_s)}"


def check_scan(key: bytes, rule: str, ids: Sequence[int], signature: str, now_s: float) -> None:
    """Raises ``GrantError`` unless the engine signed just this, a while ago at most."""
    match = _GRANT.fullmatch(signature)
    expires_at_s = int(match[1]) if match else 0
    if match is None or not hmac.compare_digest(match[2], _scan_mac(key, rule, ids, expires_at_s)):
        raise GrantError("scan is not of this prompt under this policy: leave scan and spans out")
    if now_s >= expires_at_s:
        raise GrantError(f"the scan expired at Unix time {expires_at_s}: leave scan and spans out")


def _scan_mac(key: bytes, rule: str, ids: Sequence[int], expires_at_s: int) -> str:
    return canonical_hmac(key, _SCAN_DOMAIN, [rule, list(ids), expires_at_s])


def _order_mac(key: bytes, order: bytes, expires_at_s: int) -> str:
    message = _ORDER_DOMAIN + str(expires_at_s).encode() + b"\0" + order
    return hmac.new(check_key(key), message, hashlib.sha256).hexdigest()


def _mac(key: bytes, handle: str, audience: str, expires_at_s: int) -> str:
    return canonical_hmac(key, _DOMAIN, [handle, audience, expires_at_s])
