"""One spelling of a JSON value: the bytes that digests and signatures are made of."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

KEY_BYTES = 32
"""Length of a deployment's key, at least."""


def canonical_json(value: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """JSON with sorted keys, without spaces, in ASCII; ``default`` makes JSON of what is none.
    Raises ``ValueError`` for NaN, infinities and ``TypeError`` for what JSON cannot hold."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=default
    )
    return text.encode()


def canonical_digest(value: object) -> str:
    """SHA-256 of the canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def canonical_hmac(key: bytes, domain: bytes, value: object) -> str:
    """HMAC-SHA256 of the canonical JSON, hexadecimal; ``domain`` keeps one use of ``key`` apart
    from every other, and ends in a NUL. Raises ``ValueError`` for a key that is too short."""
    return hmac.new(check_key(key), domain + canonical_json(value), hashlib.sha256).hexdigest()


def check_key(key: bytes) -> bytes:
    """``key`` if it is long enough. Raises ``ValueError`` otherwise."""
    if len(key) < KEY_BYTES:
        raise ValueError(
            f"the deployment key has {len(key)} bytes, {KEY_BYTES} are needed: "
            "make one with lcguard.handoff.keys.new_key()"
        )
    return key
