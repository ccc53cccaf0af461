"""The deployment key: what signs segments and registries, and tells a deployment's own from forged
ones."""

from __future__ import annotations

import os
import secrets

from lcguard.canonical import KEY_BYTES, check_key

KEY_VARIABLE = "LCGUARD_KEY"


def new_key() -> str:
    """A fresh deployment key, hexadecimal, for ``LCGUARD_KEY``."""
    return secrets.token_hex(KEY_BYTES)


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
