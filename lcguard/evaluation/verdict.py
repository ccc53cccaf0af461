"""How a figure prints, and the rule that turns figures into a verdict.

What is None, missing or not finite prints as *not measured*: a figure that nobody took must not
look like a good one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"
ASR_MARGIN = 0.05
UTILITY_SHARE = 0.97
LIST = "100"
"""The list of candidates that a verdict looks at."""
RULE = (
    f"protects = a fresh attacker recovers at most {ASR_MARGIN:.2f} more than the floor "
    f"({ASR_MARGIN * 100:.0f} points), so does the optimal attacker who chooses from a list of "
    f"{LIST} candidates, both with their 95% intervals, and utility is at least "
    f"{UTILITY_SHARE:.2f} of the unguarded receiver's; leaks = either recovers more than that; "
    "inconclusive = neither does, but an interval reaches further; useless = nothing leaks, but "
    "the receiver falls short of its utility."
)


@dataclass(frozen=True)
class Verdict:
    word: str
    """``protects``, ``leaks``, ``inconclusive``, ``useless`` or ``not measured``."""
    reason: str


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None (bools are no figures)."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: Any) -> str:
    found = number(value)
    return NOT_MEASURED if found is None else f"{found:.1%}"


def figure(value: Any, unit: str = "") -> str:
    """Three significant digits with a unit."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    text = f"{found:,.0f}" if abs(found) >= 1000 else f"{found:#.3g}".rstrip(".")
    return f"{text} {unit}".rstrip()


def count(value: Any) -> str:
    found = number(value)
    return NOT_MEASURED if found is None else f"{found:,.0f}"


def interval(value: Any) -> tuple[float, float] | None:
    """A pair of finite numbers, else None."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def percent_ci(value: Any, ci: Any) -> str:
    """``4.1% [2.0%, 7.5%]``."""
    found = interval(ci)
    if number(value) is None or found is None:
        return percent(value)
    return f"{percent(value)} [{found[0]:.1%}, {found[1]:.1%}]"


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def records(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [v for v in value if isinstance(v, Mapping)]


def utility_share(row: Mapping[str, Any]) -> float | None:
    """Utility relative to the unguarded receiver; from the two scores where it is not given."""
    found = number(row.get("utility_relative"))
    if found is not None:
        return found
    own, vanilla = number(row.get("utility")), number(row.get("utility_vanilla"))
    return own / vanilla if own is not None and vanilla else None


def from_list(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of the attacker who chooses from ``LIST`` candidates; empty where not measured."""
    return mapping(mapping(row.get("likelihood")).get(LIST))


def verdict(row: Mapping[str, Any]) -> Verdict:
    """``RULE`` applied to one row of ``report["results"]``."""
    fresh, floor = number(row.get("asr_fresh")), number(row.get("floor"))
    share, ceiling = utility_share(row), number(row.get("ceiling"))
    if fresh is None or floor is None:
        lacking = "fresh ASR" if fresh is None else "floor"
        return Verdict(NOT_MEASURED, f"there is no {lacking} to judge by")
    chosen, chance = (number(from_list(row).get(k)) for k in ("asr", "floor"))
    listed = chosen is not None and chance is not None
    gap = _gap(fresh, floor, "the floor")
    caveats: list[str] = []
    errors = number(mapping(row.get("counts")).get("error"))
    if errors:
        caveats.append(f"{errors:.0f} attempts ended in an error and are not scored")
    picks = ""
    if chosen is not None and chance is not None:
        picks = f"an attacker who enumerates {LIST} candidates is {_gap(chosen, chance, 'chance')}"
    beyond = [
        text
        for text, leaks in ((gap, _above(fresh, floor)), (picks, listed and _above(chosen, chance)))
        if leaks
    ]
    if beyond:
        if share is not None and share < UTILITY_SHARE:
            caveats.insert(0, f"the receiver keeps only {share:.1%} of its utility too")
        return Verdict("leaks", "; ".join([*beyond, *caveats]))
    if ceiling is not None and ceiling <= floor + ASR_MARGIN:
        caveats.append("the attackers fail without any guard too, so this shows little")
    held = [gap, picks] if picks else [gap]
    absent = [what for what, missing in (("utility was not measured", share is None),
                                          ("no attacker enumerated candidates", not listed))
               if missing]  # fmt: skip
    if absent or share is None:
        return Verdict(NOT_MEASURED, "; ".join([*held, *absent, *caveats]))
    if share < UTILITY_SHARE - 1e-9:
        short = f"the receiver keeps only {share:.1%} of its utility"
        return Verdict("useless", "; ".join([short, *caveats]))
    wide = [
        f"the interval {of}still reaches {ci[1]:.1%}"
        for ci, blind, of in (
            (interval(row.get("asr_fresh_ci")), floor, ""),
            (interval(from_list(row).get("ci")), chance, "of that "),
        )
        if ci and blind is not None and _above(ci[1], blind)
    ]
    return Verdict("inconclusive" if wide else "protects", "; ".join([*held, *wide, *caveats]))


def _above(asr: float | None, floor: float | None) -> bool:
    return asr is not None and floor is not None and asr > floor + ASR_MARGIN + 1e-9


def _gap(asr: float, floor: float, what: str) -> str:
    side = "above" if asr >= floor else "below"
    return f"{abs(asr - floor) * 100:.1f} points {side} {what}"
