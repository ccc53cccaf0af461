"""The leakage meter: what canaries lost on each edge, and whether it is open.

An edge closes where planted secrets were read off its segments, and stays closed over a restart
until two screenings in a row show that nothing leaks (one, under another guard or policy), or
until an operator opens it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from lcguard.server.leakage.edge_state import (
    EdgeLeakage,
    EdgeName,
    LeakageError,
    Point,
    Screening,
    State,
    load_state,
    save_state,
)

__all__ = ["Change", "EdgeLeakage", "EdgeName", "LeakageError", "LeakageMeter"]

logger = logging.getLogger("lcguard.server")
HISTORY = 50
STALE_INTERVALS = 3
CLEAN_RUNS = 2
"""Clean screenings in a row that open an edge under the guard and policy that closed it."""

_FIGURES = ("asr", "asr_low", "asr_high", "floor", "n_secrets", "recovered")
_UNMEASURED: dict[str, Any] = dict.fromkeys(_FIGURES)
_CIRCUMSTANCES = ("attack", "guard", "guard_digest", "policy_digest", "seconds", "shared_with")
"""What an edge keeps of a screening, under the same names."""


class Change(NamedTuple):
    """What a result did to its edge."""

    edge: EdgeLeakage
    old: State
    new: State


class LeakageMeter:
    """State of all edges, kept in one JSON file. Safe to use from several threads."""

    def __init__(
        self,
        path: Path,
        threshold: float,
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ``LeakageError`` for a file that cannot be read: it may say what is closed."""
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold}: give a success rate between 0 and 1")
        self.path, self.threshold, self.interval_s, self._clock = path, threshold, interval_s, clock
        self._lock = threading.Lock()
        self._edges = load_state(path)
        self.error = ""
        """Why the state could not be written; empty while it can. Memory is right all the same."""

    def verdict(self, tenant: str, source: str, audience: str) -> State:
        """``open`` for an edge that was never screened."""
        edge = self._edges.get((tenant, source, audience))
        return "open" if edge is None else edge.state

    def record(self, result: Mapping[str, Any]) -> Change:
        """Takes a screening of one edge, as the worker gives it.

        Raises ``ValueError`` for one that is not consistent: it neither closes nor opens.
        """
        try:
            found = Screening.model_validate(dict(result))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "result"
            raise ValueError(f"the screening cannot be used: {where}: {first['msg']}") from None
        with self._lock:
            old = self._edge(found.name)
            new = self._judged(old, found)
            self._keep(new)
        return Change(new, old.state, new.state)

    def record_error(self, edge: EdgeName, message: str) -> Change:
        """An edge that could not be screened: it stays as it is."""
        line = " ".join(message.split())[:300]
        with self._lock:
            old = self._edge(edge)
            new = replace(old, error=line, error_at_s=self._clock())
            self._keep(new)
        return Change(new, old.state, new.state)

    def reopen(self, edge: EdgeName, who: str) -> Change:
        """Opens an edge on an operator's word; the next screening judges afresh.

        Raises:
            KeyError: an edge without any record.
            LeakageError: the file cannot be written; the edge stays as it is.
        """
        with self._lock:
            old = self._edges[edge]
            new = replace(old, state="open", reason=f"opened by {who}"[:200], clean_runs=0)
            edges = self._edges | {edge: new}
            save_state(self.path, edges)
            self._edges = edges
        return Change(new, old.state, new.state)

    def snapshot(self) -> list[EdgeLeakage]:
        """All edges by name."""
        now = self._clock()
        return [self._aged(e, now) for _, e in sorted(self._edges.items())]

    def _edge(self, name: EdgeName) -> EdgeLeakage:
        return self._edges.get(name) or EdgeLeakage(*name, since_s=self._clock())

    def _aged(self, edge: EdgeLeakage, now: float) -> EdgeLeakage:
        last = edge.since_s if edge.measured_at_s is None else edge.measured_at_s
        return replace(edge, stale=now - last > STALE_INTERVALS * self.interval_s)

    def _keep(self, edge: EdgeLeakage) -> None:
        # memory first: a full disk must not keep an edge open
        edges = self._edges | {edge.name: edge}
        self._edges = edges
        try:
            save_state(self.path, edges)
        except LeakageError as error:
            self.error = str(error)
            logger.error("%s", error)
        else:
            self.error = ""

    def _judged(self, old: EdgeLeakage, s: Screening) -> EdgeLeakage:
        now = self._clock()
        if s.skipped is not None:
            # The policy hides nothing here any more, so nothing can leak.
            return replace(
                old,
                state="open",
                reason=s.skipped,
                skipped=s.skipped,
                measured_at_s=now,
                clean_runs=0,
                error="",
                error_at_s=None,
                **_UNMEASURED,
            )
        measured = replace(
            old,
            **{name: getattr(s, name) for name in (*_FIGURES, *_CIRCUMSTANCES)},
            skipped="",
            error="",
            error_at_s=None,
            measured_at_s=now,
            history=(*old.history, Point(now, s.asr, s.asr_low, s.asr_high))[-HISTORY:],
        )
        state, reason, clean = self._rule(old, s)
        if s.asr_low > self._limit(s):  # also while closed: another guard may leak as well
            measured = replace(
                measured,
                closed_guard_digest=s.guard_digest,
                closed_policy_digest=s.policy_digest,
                closed_at_s=now if old.state == "open" else old.closed_at_s,
            )
        return replace(measured, state=state, reason=reason, clean_runs=clean)

    def _limit(self, s: Screening) -> float:
        """What the attack guesses without the segment (the floor) did not leak from it."""
        return max(self.threshold, s.floor)

    def _rule(self, old: EdgeLeakage, s: Screening) -> tuple[State, str, int]:
        """State, reason, and clean screenings so far.

        The interval's ends decide, not its middle: a guard whose true rate is the threshold itself
        would be closed by every second estimate, and by one lower bound in forty.
        """
        limit = self._limit(s)
        shown = f"{s.recovered} of {s.n_secrets} planted secrets ({s.asr:.0%}) by {s.attack!r}"
        if s.asr_low > limit:
            return "closed", f"{shown}: at least {s.asr_low:.0%}, above {limit:.0%}", 0
        if old.state == "open":
            return "open", "", 0
        if s.asr_high >= limit:  # no proof of a leak, and none of its absence
            return "closed", f"{shown}: up to {s.asr_high:.0%} is not below {limit:.0%}", 0
        clean = old.clean_runs + 1
        before = old.closed_guard_digest, old.closed_policy_digest
        wanted = 1 if (s.guard_digest, s.policy_digest) != before else CLEAN_RUNS
        if clean >= wanted:
            return "open", f"opened after {clean} clean screening(s)", 0
        return "closed", f"{shown}: clean, {wanted - clean} more to open", clean
