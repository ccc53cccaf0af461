"""Edges as a canary's job names them."""

from __future__ import annotations

from typing import Any

KEY = "5a" * 32
EDGES = [("t", "a", "b"), ("t", "a", "c")]


def edge(audience: str, *forbid: str, **more: Any) -> dict[str, Any]:
    return {"tenant": "t", "source": "a", "audience": audience, "forbid": list(forbid)} | more
