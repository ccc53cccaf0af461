"""Text that shows all it holds: names on the dashboard may have been chosen to deceive."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Control characters, direction overrides and surrogates as ``�``; no escaping for HTML."""
    return "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c
        for c in text
    )
