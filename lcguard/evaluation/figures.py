"""Figures as JSON can hold them: what is not finite was not measured, and is None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None (bools are no figures)."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(value: Any) -> tuple[float, float] | None:
    """A pair of finite numbers, else None."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)


def readable(value: Any) -> Any:
    """Scalars of Python, no half characters: what JSON can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {readable(k): readable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [readable(v) for v in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return readable(value.item())  # numpy and torch scalars
    return number(value) if isinstance(value, float) else value


Figure = Annotated[float | None, BeforeValidator(number)]
Count = Annotated[int | None, BeforeValidator(_count)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(interval)]
