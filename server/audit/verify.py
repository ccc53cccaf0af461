"""Finds what was done to an audit trail; reads it also while servers write to it.

Seen: rows altered, removed, swapped, inserted or repeated, an end cut off, a head altered, another
key. Not seen from the trail alone: all of it put back to an older state. For that, keep a printed
head elsewhere and give it back as ``head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcguard.server.audit.chain import Chain, Mark, same
from lcguard.server.audit.trail import COLUMNS
from lcguard.server.database.place import place_of, reading

_SHOWN = 20
_BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Verification:
    """What was found."""

    rows: int
    head: str
    """``COUNT:MAC`` of the last row, to be kept elsewhere; means something without problems."""
    problems: list[str]
    """The first 20, by row, and a line with the number of the others; empty: all is well."""


def verify(
    where: Path | str, key: bytes, *, head: str | None = None, at_least: int | None = None
) -> Verification:
    """Checks every row; memory does not grow with their number.

    Args:
        where: a file or ``postgresql://...``.
        key: the deployment key.
        head: a head printed earlier: its row must still be there, unchanged.
        at_least: rows that there were once.

    Raises:
        DatabaseError: nothing that can be read, or not LCGuard's.
        ValueError: a key too short, or ``head`` is none.
    """
    walk = _Walk(Chain(key), Mark() if head is None else Mark.parse(head))
    place = place_of(where, _BUSY_TIMEOUT_S)
    with reading(place) as connection:  # one snapshot, whatever servers write meanwhile
        try:
            heads = list(place.scan(connection, "SELECT count, mac, hmac FROM audit_head LIMIT 2"))
            for seq, *values, mac in place.scan(
                connection, f"SELECT {', '.join(COLUMNS)}, mac FROM audit ORDER BY seq"
            ):
                walk.row(seq, values, mac)
        except place.error as error:
            found = place.explained(error)
            walk.add(f"reading ended after row {walk.last.count}: {found or error}")
        else:
            walk.end(heads, at_least)
    return Verification(walk.n_rows, str(walk.last), walk.all_problems())


@dataclass
class _Walk:
    """The rows so far."""

    chain: Chain
    kept: Mark
    last: Mark = field(default_factory=Mark)
    before: str | None = Mark().mac
    """Mac of the row before; None where that row is missing, so that the next cannot be checked."""
    kept_found: object = None
    n_rows: int = 0
    n_good: int = 0
    n_problems: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.n_problems += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)

    def all_problems(self) -> list[str]:
        others = self.n_problems - len(self.problems)
        return self.problems + ([f"and {others} more"] if others else [])

    def row(self, seq: object, values: Sequence[object], mac: object) -> None:
        self.n_rows += 1
        due = self.last.count + 1
        if type(seq) is not int or seq < due:
            self.add(f"row {_short(seq)}: inserted or repeated, row {due} was due")
            return
        if seq > due:
            self.add(f"{_range(due, seq - 1)} missing")
            self.before = None
        if self.before is not None:
            try:
                good = same(mac, self.chain.row(self.before, _named(seq, values)))
            except (TypeError, ValueError):  # a type that no row of ours has
                good = False
            if good:
                self.n_good += 1
            else:
                self.add(f"row {seq}: altered, moved or forged")
        text = mac if isinstance(mac, str) and mac.isascii() else ""
        self.last, self.before = Mark(seq, text), text
        if seq == self.kept.count:
            self.kept_found = mac

    def end(self, heads: Sequence[tuple[object, object, object]], at_least: int | None) -> None:
        head_good = self._head(heads)
        if self.n_rows and not self.n_good and not head_good:
            self.problems.insert(
                0,
                "nothing here was made with this key: give the key of this deployment "
                "(LCGUARD_KEY), or the whole trail was forged",
            )
            self.n_problems += 1
        n = self.last.count
        if n < self.kept.count:
            self.add(
                f"{_range(n + 1, self.kept.count)} of the kept head missing: rows were removed, or "
                "the file was put back to an older state"
            )
        elif self.kept.count and self.kept_found != self.kept.mac:
            self.add(f"row {self.kept.count}: not the one of the kept head, history was rewritten")
        if at_least is not None and self.n_rows < at_least:
            self.add(
                f"{self.n_rows} rows, at least {at_least} were expected: rows were removed, or the "
                "file was put back to an older state"
            )

    def _head(self, heads: Sequence[tuple[object, object, object]]) -> bool:
        """Whether the head row is genuine; says what is wrong with it, or with the rows."""
        if len(heads) != 1:
            self.add("head row: repeated" if heads else "head row: missing")
            return False
        count, mac, signature = heads[0]
        if not isinstance(count, int) or not self.chain.is_head(count, mac, signature):
            self.add("head row: altered, or made with another key")
            return False
        n = self.last.count
        if count > n:
            self.add(f"{_range(n + 1, count)} missing at the end")
        elif count < n:
            self.add(f"{_range(count + 1, n)} inserted at the end, the head is for row {count}")
        elif mac != self.last.mac:
            self.add(f"row {n}: its mac is not the one of the head")
        return True


def _named(seq: int, values: Sequence[object]) -> dict[str, object]:
    return dict(zip(COLUMNS, (seq, *values), strict=True))


def _range(first: int, last: int) -> str:
    return f"row {first}" if first == last else f"rows {first} to {last}"


def _short(value: object) -> str:
    return ascii(value)[:40]
