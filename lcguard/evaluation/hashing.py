"""Content hashes: equal content, equal hash, in every process and on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from lcguard.canonical import canonical_json


def canonical(obj: Any) -> str:
    """JSON with sorted keys and no spaces: equal objects give equal text.

    Raises ``ValueError`` for NaN, infinities and objects that JSON cannot hold.
    """
    try:
        return canonical_json(obj, default=_plain).decode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{str(obj)[:120]!r} has no canonical JSON ({error}): "
            "use None for what was not measured, and strings, numbers, lists and dicts only"
        ) from error


def digest(obj: Any) -> str:
    """Sha256, in hex, of the canonical JSON of ``obj`` (dataclasses and pydantic models too)."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return dataclasses.asdict(obj)
    if hasattr(obj, "model_dump"):
        return obj.model_dump(mode="json")
    if hasattr(obj, "item") and getattr(obj, "ndim", None) == 0:  # numpy and torch scalars
        return obj.item()
    if isinstance(obj, Mapping):
        return dict(obj)
    raise TypeError(f"{type(obj).__name__} is not JSON")
