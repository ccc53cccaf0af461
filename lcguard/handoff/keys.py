"""The deployment key: what signs segments, and tells a deployment's own from forged ones."""

from __future__ import annotations

import os
import secrets

KEY_VARIABLE = "LCGUARD_KEY"
_KEY_BYTES = 32


def new_key() -> str:
    """A fresh deployment key, hexadecimal, for ``LCGUARD_KEY``."""
    return secrets.token_hex(_KEY_BYTES)


def deployment_key() -> bytes:
    """The key of ``LCGUARD_KEY``.

    Raises:
        ValueError: unset, not hexadecimal or shorter than 32 bytes.
    """
    text = os.environ.get(KEY_VARIABLE, "").strip()
    if not text:
        raise ValueError(
            f"{KEY_VARIABLE} is not set: set it to the output of lcguard.handoff.keys.new_key()"
        )
    try:
        key = bytes.fromhex(text)
    except ValueError:
        # The message must not show the key, so neither must its cause.
        raise ValueError(
            f"{KEY_VARIABLE} is not hexadecimal: "
            "set it to the output of lcguard.handoff.keys.new_key()"
        ) from None
    return check_key(key)


def check_key(key: bytes) -> bytes:
    """``key`` if it is long enough. Raises ``ValueError`` otherwise."""
    if len(key) < _KEY_BYTES:
        raise ValueError(
            f"the deployment key has {len(key)} bytes, {_KEY_BYTES} are needed: "
            "make one with lcguard.handoff.keys.new_key()"
        )
    return key
