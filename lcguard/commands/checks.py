"""What ``lcguard doctor`` says of one thing that it looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.text import Text

from lcguard.commands.script import one_line
from lcguard.server.database.connection import DatabaseError
from lcguard.store import StoreError

Level = Literal["ok", "warning", "fails"]
_STYLE: dict[Level, str] = {"ok": "green", "warning": "yellow", "fails": "bold red"}


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    what: str
    level: Level
    detail: str
    """What was found; where it is not ``ok``, with the fix."""


class Advice(Exception):
    """Raised by a check for what works and yet should be changed."""


Check = Callable[[], str]
"""Returns a detail; raises ``ValueError``, ``OSError`` or ``StoreError`` with what does not hold,
``Advice`` for what should be changed."""


def results(checks: Mapping[str, Check]) -> list[Result]:
    """Of all checks in their order: unlike a start, a doctor does not stop at the first."""
    return [_result(what, check) for what, check in checks.items()]


def _result(what: str, check: Check) -> Result:
    try:
        return Result(what, "ok", check())
    except Advice as advice:
        return Result(what, "warning", " ".join(str(advice).split()))
    except (ValueError, OSError, StoreError, DatabaseError) as error:
        return Result(what, "fails", one_line(error))


def all_hold(found: Iterable[Result]) -> bool:
    """Whether none fails; a warning is no failure."""
    return all(r.level != "fails" for r in found)


def as_json(found: Sequence[Result]) -> dict[str, Any]:
    """For machines."""
    return {"ok": all_hold(found), "checks": [asdict(r) for r in found]}


def as_lines(found: Sequence[Result]) -> list[Text]:
    """For people: a line each, its level first."""
    width = max(len(r.what) for r in found)
    return [
        Text.assemble((f"{r.level:<8}", _STYLE[r.level]), f"{r.what:<{width}}  {r.detail}")
        for r in found
    ]
