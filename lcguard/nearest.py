"""What is said of a name that there is not: the same wherever it is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: object, known: Iterable[str]) -> str:
    """The fix: the known name that is most like it, or all of them."""
    names = [*known]
    # a long name costs the comparison time
    close = difflib.get_close_matches(str(name)[:60], names, 1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names) or 'none'}"


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line: ``guard 'gat' is unknown: did you mean 'gate'?``."""
    return f"{what} {name!r} is unknown: {hint(name, known)}"
