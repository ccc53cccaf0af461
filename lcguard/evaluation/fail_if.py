"""``--fail-if``: a condition on a report under which a build must not pass.

::

    expression := term ("or" term)*
    term       := factor ("and" factor)*
    factor     := "(" expression ")" | [guard "."] metric comparison number
    comparison := ">" | ">=" | "<" | "<=" | "==" | "!="

``gate.asr_upper>0.05`` speaks of the guard ``gate`` (in a report over several hops, of any of its
rows, and ``asr`` is what the whole graph gives away); ``asr_upper>0.05`` speaks of any row.
Conditions without a guard speak of the same row: ``asr_upper>0.05 and utility<0.9`` holds where
one guard does both. A figure that was not measured meets every condition on it: a check that cannot
see must not open.

Parsed by hand, in three functions: a library's grammar would be as long, and its errors would not
name the metric or guard that is wrong.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcguard.evaluation.results import GuardRow, Report


def _end(ci: tuple[float, float] | None, index: int) -> float | None:
    return None if ci is None else ci[index]


def _advantage(row: GuardRow) -> float | None:
    asr = row.headline[0]
    return None if asr is None or row.floor is None else asr - row.floor


METRICS: dict[str, Callable[[GuardRow], float | None]] = {
    "asr": lambda row: row.headline[0],
    "asr_upper": lambda row: _end(row.headline[1], 1),
    "asr_lower": lambda row: _end(row.headline[1], 0),
    "utility": lambda row: row.utility,
    "utility_relative": lambda row: row.utility_relative,
    "injection": lambda row: row.asr_injection,
    "likelihood": lambda row: row.listed.asr,
    "likelihood_upper": lambda row: _end(row.listed.ci, 1),
    "floor": lambda row: row.floor,
    "advantage": _advantage,
    "errors": lambda row: row.counts.error if row.counts else row.errors,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

_TOKEN = re.compile(r"\s*(>=|<=|==|!=|>|<|\(|\)|[^\s<>=!()]+)")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Condition:
    """One comparison; ``guard`` is empty where it speaks of any."""

    guard: str
    metric: str
    sign: str
    limit: float

    def holds(self, row: GuardRow) -> bool:
        value = METRICS[self.metric](row)
        return value is None or COMPARISONS[self.sign](value, self.limit)

    def line(self, row: GuardRow) -> str:
        value = METRICS[self.metric](row)
        shown = f"{value:.4g}" if value is not None else "not measured, which counts as violated:"
        return f"{row.label}: {self.metric} {shown} {self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Joined:
    """Conditions under one word."""

    join: Callable[[Iterator[bool]], bool]
    """``any`` or ``all``."""
    parts: tuple[Node, ...]


Node = Condition | Joined


@dataclass(frozen=True)
class FailIf:
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

    def violations(self, report: Report | Mapping[str, Any]) -> list[str]:
        """One line per condition that makes the expression true; none where it is false.

        Raises ``ValueError`` for a guard that the report does not have.
        """
        rows = Report.of(report).results
        self.check_guards(list(dict.fromkeys(row.guard for row in rows)))
        if not rows:
            return [f"the report has no guard to judge by {self.text!r}"]

        def about(condition: Condition, row: GuardRow) -> list[GuardRow]:
            return [r for r in rows if r.guard == condition.guard] if condition.guard else [row]

        def true(node: Node, row: GuardRow) -> bool:
            if isinstance(node, Condition):
                return any(map(node.holds, about(node, row)))
            return node.join(true(part, row) for part in node.parts)

        lines = {
            condition.line(of): None
            for row in rows
            if true(self.root, row)
            for condition in _conditions(self.root)
            for of in about(condition, row)
            if condition.holds(of)
        }
        return list(lines)


def parse_fail_if(text: str) -> FailIf:
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
    return FailIf(text, root)


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
        return self._joined("or", any, lambda: self._joined("and", all, self.factor))

    def _joined(
        self, word: str, join: Callable[[Iterator[bool]], bool], part: Callable[[], Node]
    ) -> Node:
        parts = [part()]
        while self.here == word:
            self.at += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else Joined(join, tuple(parts))

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
