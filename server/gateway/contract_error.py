"""A request outside the guard contract, and what its refusals have in common."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""What a JSON value is called."""


class ContractError(Exception):
    """A request outside the contract: one line with the field and the fix, and nothing of the
    prompt."""

    status = 400

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


def unknown(name: str, known: Mapping[str, object], param: str) -> ContractError:
    """The refusal of a name that is not ``known``, with the nearest that is."""
    # A long name costs the comparison time, and the client sends it.
    close = difflib.get_close_matches(name[:60], known, 1)
    hint = f"did you mean {close[0]!r}?" if close else "leave it out"
    return ContractError(f"{shown(param)} is no field of the guard contract: {hint}", shown(param))


def named(value: object) -> str:
    """What kind of JSON value it is, in words."""
    if type(value) is float and not math.isfinite(value):
        return "not finite"
    return NAMES.get(type(value), "no JSON value")


def shown(name: str) -> str:
    """A client's name for something, short and in ASCII: it goes to logs and headers."""
    return ascii(name[:80])[1:-1][:120]
