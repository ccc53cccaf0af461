"""``--fail-if``: a condition on a report under which a build must not pass.

::

    expression := term ("or" term)*
    term       := factor ("and" factor)*
    factor     := "(" expression ")" | [guard "."] metric comparison number
    comparison := ">" | ">=" | "<" | "<=" | "==" | "!="

``gate.asr_upper>0.05`` speaks of the guard ``gate`` (in a report over several hops, of any of its
rows, and ``asr`` is what the whole graph gives away); ``asr_upper>0.05`` speaks of any row.
Conditions without a guard speak of the same row: ``asr_upper>0.05 and utility<0.9`` holds where
one guard does both. A figure that was not measured meets every condition on it: a gate that cannot
see must not open.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcguard.evaluation.compare import headline, label
from lcguard.evaluation.verdict import from_list, interval, mapping, number, records

Row = Mapping[str, Any]


def _bound(index: int) -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        ci = headline(row)[1]
        return None if ci is None else ci[index]

    return read


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.get(name))


def _asr(row: Row) -> float | None:
    return headline(row)[0]


def _advantage(row: Row) -> float | None:
    asr, floor = _asr(row), number(row.get("floor"))
    return None if asr is None or floor is None else asr - floor


def _list_upper(row: Row) -> float | None:
    ci = interval(from_list(row).get("ci"))
    return None if ci is None else ci[1]


def _errors(row: Row) -> float | None:
    found = mapping(row.get("counts"))
    return number(found.get("error") if found else row.get("errors"))


METRICS: dict[str, Callable[[Row], float | None]] = {
    "asr": _asr,
    "asr_upper": _bound(1),
    "asr_lower": _bound(0),
    "utility": _field("utility"),
    "utility_relative": _field("utility_relative"),
    "injection": _field("asr_injection"),
    "likelihood": lambda row: number(from_list(row).get("asr")),
    "likelihood_upper": _list_upper,
    "floor": _field("floor"),
    "advantage": _advantage,
    "errors": _errors,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip

_TOKEN = re.compile(r"\s*(>=|<=|==|!=|>|<|\(|\)|[^\s<>=!()]+)")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Condition:
    """One comparison; ``guard`` is empty where it speaks of any."""

    guard: str
    metric: str
    sign: str
    limit: float

    def holds(self, row: Row) -> bool:
        value = METRICS[self.metric](row)
        return value is None or COMPARISONS[self.sign](value, self.limit)

    def line(self, row: Row) -> str:
        value = METRICS[self.metric](row)
        shown = f"{value:.4g}" if value is not None else "not measured, which counts as violated:"
        return f"{label(row)}: {self.metric} {shown} {self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Either:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Both:
    parts: tuple[Node, ...]


Node = Condition | Either | Both


@dataclass(frozen=True)
class Gate:
    """A parsed expression."""

    text: str
    root: Node

    def check_guards(self, guards: Sequence[str]) -> None:
        """Raises ``ValueError`` for a guard that is not among ``guards``."""
        for condition in _conditions(self.root):
            if condition.guard and condition.guard not in guards:
                raise ValueError(
                    f"--fail-if {self.text!r}: guard {condition.guard!r} is not in the run; "
                    f"guards: {', '.join(guards)}"
                )

    def violations(self, report: Mapping[str, Any]) -> list[str]:
        """One line per condition that makes the expression true; none where it is false.

        Raises ``ValueError`` for a guard that the report does not have.
        """
        rows = records(report.get("results"))
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            by_name.setdefault(str(row.get("guard")), []).append(row)
        self.check_guards(list(by_name))
        if not rows:
            return [f"the report has no guard to judge by {self.text!r}"]
        lines: dict[str, None] = {}
        for row in rows:
            if _true(self.root, row, by_name):
                for condition in _conditions(self.root):
                    for about in _about(condition, row, by_name):
                        if condition.holds(about):
                            lines[condition.line(about)] = None
        return list(lines)


def parse_gate(text: str) -> Gate:
    """Raises ``ValueError`` in one line naming what cannot be read, and what can."""
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        found = _TOKEN.match(stripped, position)
        if found is None:
            raise _error(text, f"{stripped[position:]!r} cannot be read")
        tokens.append(found[1])
        position = found.end()
    parser = _Parser(text, tokens)
    root = parser.expression()
    if parser.here is not None:
        raise _error(text, f"{parser.here!r} follows a complete condition; join with and, or")
    return Gate(text, root)


class _Parser:
    def __init__(self, text: str, tokens: list[str]) -> None:
        self.text, self.tokens, self.at = text, tokens, 0

    @property
    def here(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, wanted: str) -> str:
        if self.here is None:
            raise _error(self.text, f"it ends where {wanted} should stand")
        self.at += 1
        return self.tokens[self.at - 1]

    def expression(self) -> Node:
        parts = [self.term()]
        while self.here == "or":
            self.at += 1
            parts.append(self.term())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def term(self) -> Node:
        parts = [self.factor()]
        while self.here == "and":
            self.at += 1
            parts.append(self.factor())
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def factor(self) -> Node:
        if self.here == "(":
            self.at += 1
            inner = self.expression()
            if self.take("`)`") != ")":
                raise _error(self.text, f"{self.tokens[self.at - 1]!r} stands where `)` should")
            return inner
        guard, _, metric = self.take("a metric").rpartition(".")
        if metric not in METRICS:
            raise _error(self.text, f"metric {metric!r} is unknown")
        sign = self.take("a comparison")
        if sign not in COMPARISONS:
            raise _error(self.text, f"{sign!r} is no comparison: use {' '.join(COMPARISONS)}")
        limit = self.take("a number")
        if not _NUMBER.fullmatch(limit):
            raise _error(self.text, f"{limit!r} is no number")
        return Condition(guard, metric, sign, float(limit))


def _about(condition: Condition, row: Row, by_name: Mapping[str, list[Row]]) -> list[Row]:
    return by_name[condition.guard] if condition.guard else [row]


def _true(node: Node, row: Row, by_name: Mapping[str, list[Row]]) -> bool:
    if isinstance(node, Condition):
        return any(node.holds(about) for about in _about(node, row, by_name))
    found = (_true(part, row, by_name) for part in node.parts)
    return any(found) if isinstance(node, Either) else all(found)


def _conditions(node: Node) -> Iterator[Condition]:
    if isinstance(node, Condition):
        yield node
        return
    for part in node.parts:
        yield from _conditions(part)


def _error(text: str, problem: str) -> ValueError:
    return ValueError(
        f"--fail-if {text!r}: {problem}; write such as gate.asr_upper>0.05, with one of: "
        f"{', '.join(METRICS)}"
    )
