"""The leakage meter: what canaries lost on each edge, and whether it is open.

An edge closes where planted secrets were read off its segments, for every proxy of the database,
and stays closed over a restart until two screenings in a row show that nothing leaks (one, under
another guard or policy), or until an operator opens it.
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

from lcguard.server.database.connection import Connection, DatabaseError
from lcguard.server.database.writer import Database
from lcguard.server.leakage.edge_state import (
    EdgeLeakage,
    EdgeName,
    LeakageError,
    Point,
    Screening,
    State,
    adopt,
    all_edges,
    load_file,
    retire_file,
    store_edge,
    stored_edge,
    stored_state,
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
    """State of all edges, in the database. Safe to use from several threads; every call waits for
    the database."""

    def __init__(
        self,
        database: Database,
        threshold: float,
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ``LeakageError`` for a state that cannot be read: it may say what is closed."""
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold}: give a success rate between 0 and 1")
        self.threshold, self.interval_s, self._clock = threshold, interval_s, clock
        self._database = database
        self._lock = threading.Lock()
        self._unwritten: dict[EdgeName, EdgeLeakage] = {}
        """Edges that closed while nothing could be written: closed here all the same."""
        self.error = ""
        """Why the last result could not be written; empty where it could."""
        database.read(all_edges)

    def adopt_file(self, path: Path) -> None:
        """Takes over the file of a release that kept its edges there. Raises ``LeakageError``,
        ``DatabaseError`` or ``OSError``, and leaves it as it is then."""
        if edges := load_file(path):
            self._database.write_now(lambda connection: adopt(connection, edges))
        if path.exists():
            retire_file(path)

    def verdict(self, tenant: str, source: str, audience: str) -> State:
        """``open`` for an edge that was never screened. Raises ``DatabaseError``."""
        name = (tenant, source, audience)
        if name in self._unwritten:
            return "closed"
        return self._database.read(lambda connection: stored_state(connection, name))

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
        return self._change(found.name, lambda old: self._judged(old, found))

    def record_error(self, edge: EdgeName, message: str) -> Change:
        """An edge that could not be screened: it stays as it is."""
        line = " ".join(message.split())[:300]
        return self._change(edge, lambda old: replace(old, error=line, error_at_s=self._clock()))

    def reopen(self, edge: EdgeName, who: str) -> Change:
        """Opens an edge on an operator's word; the next screening judges afresh.

        Raises:
            KeyError: an edge without any record.
            DatabaseError: it cannot be written; the edge stays as it is.
        """

        def work(connection: Connection) -> Change:
            old = self._unwritten.get(edge) or stored_edge(connection, edge)
            if old is None:
                raise KeyError(edge)
            new = replace(old, state="open", reason=f"opened by {who}"[:200], clean_runs=0)
            store_edge(connection, new)
            return Change(new, old.state, new.state)

        with self._lock:
            change = self._database.write_now(work)
            self._unwritten.pop(edge, None)
        return change

    def snapshot(self) -> list[EdgeLeakage]:
        """All edges by name. Raises ``DatabaseError``."""
        now, edges = self._clock(), self._database.read(all_edges) | self._unwritten
        return [self._aged(e, now) for _, e in sorted(edges.items())]

    def _change(self, name: EdgeName, judged: Callable[[EdgeLeakage], EdgeLeakage]) -> Change:
        def work(connection: Connection | None) -> Change:
            old = self._unwritten.get(name)
            if old is None and connection is not None:
                old = stored_edge(connection, name)
            old = old or EdgeLeakage(*name, since_s=self._clock())
            new = judged(old)
            if connection is not None:
                store_edge(connection, new)
            return Change(new, old.state, new.state)

        with self._lock:
            try:
                change = self._database.write_now(work)
            except DatabaseError as error:
                # a full disk must not keep an edge open; nor does it open one
                self.error = str(error)
                logger.error("%s", error)
                change = work(None)
                if change.new == "closed":
                    self._unwritten[name] = change.edge
            else:
                self.error = ""
                self._unwritten.pop(name, None)
        return change

    def _aged(self, edge: EdgeLeakage, now: float) -> EdgeLeakage:
        last = edge.since_s if edge.measured_at_s is None else edge.measured_at_s
        return replace(edge, stale=now - last > STALE_INTERVALS * self.interval_s)

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
