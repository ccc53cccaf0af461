"""What an evaluation writes down: one line per attempt, one commit line per unit of work.

A *unit* is what is worth resuming: the attempts of one guard, policy, attack and seed under one
configuration. Its lines count only once its commit line is on disk, so a run that is killed at
any moment and started again ends with the same attempts as a run that was left alone::

    {"type": "attempt", "unit": "9f2c…", "guard": "gate", "outcome": "resisted", …}
    {"type": "commit", "unit": "9f2c…", "count": 1, "sha256": "…", "content": {"guard": "gate"}}
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lcguard.evaluation.hashing import canonical, digest

if sys.platform != "win32":
    import fcntl

Kind = Literal[
    "attack",
    "likelihood",
    "floor",
    "ceiling",
    "train",
    "injection",
    "utility",
    "allowed",
    "derived",
]
KINDS: tuple[str, ...] = get_args(Kind)


class Outcome(StrEnum):
    """How one attempt ended. Only the first two enter an ASR; all four are always reported."""

    SUCCESS = "success"
    RESISTED = "resisted"
    ERROR = "error"
    """The attempt could not be scored: never a point for the guard."""
    NOT_APPLICABLE = "not_applicable"
    """The question does not arise (a guard that has no training-time attacker, say)."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One question put to one segment, and what came of it."""

    scenario: str
    edge: str
    record: str
    guard: str
    policy: str
    attack: str
    """Name of the attack; for utility lines, of the task."""
    seed: int
    category: str
    field: str
    kind: Kind
    outcome: Outcome
    score: float | None = None
    """Token accuracy in 0..1, or the task's own score; None where not scorable."""
    nll_nats: float | None = None
    """Cross-entropy of the true value under the attacker, over the whole value."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    key: str = ""
    """Content hash of what identifies the attempt (not of how it ended); filled in if empty."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        try:
            object.__setattr__(self, "outcome", Outcome(self.outcome))
        except ValueError as error:
            allowed = ", ".join(o.value for o in Outcome)
            raise ValueError(
                f"outcome {self.outcome!r} is unknown: use one of {allowed}"
            ) from error
        for name in ("score", "nll_nats"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}: use None for what cannot be scored")
        # Through JSON once, so that an attempt read back equals the attempt written.
        object.__setattr__(self, "extra", json.loads(canonical(dict(self.extra))))
        if not self.key:
            object.__setattr__(self, "key", digest([getattr(self, n) for n in _IDENTITY]))

    @property
    def secret(self) -> tuple[str, str, str, str, str]:
        """What was asked for, whoever asked: the same for every attack and seed."""
        return (self.scenario, self.edge, self.record, self.category, self.field)

    @property
    def scorable(self) -> bool:
        return self.outcome in (Outcome.SUCCESS, Outcome.RESISTED)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"outcome": self.outcome.value}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Attempt:
        """Raises ``ValueError`` where the line lacks a field or has one too many."""
        try:
            return cls(**line)
        except TypeError as error:
            raise ValueError(f"not an attempt: {error}") from error


_IDENTITY = (
    "scenario",
    "edge",
    "record",
    "guard",
    "policy",
    "attack",
    "seed",
    "category",
    "field",
    "kind",
)


@dataclass
class _Unit:
    content: dict[str, Any]
    attempts: list[Attempt]


def _scan(data: bytes, name: str) -> tuple[dict[str, _Unit], int]:
    """Committed units, and the length in bytes of the part of the file that they fill.

    Raises ``ValueError`` for damage that no interrupted append explains.
    """
    units: dict[str, _Unit] = {}
    pending: list[dict[str, Any]] = []
    torn: str | None = None
    end = position = 0
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        position += len(raw)
        try:
            line = json.loads(raw)
            complete = raw.endswith(b"\n") and line["type"] in ("attempt", "commit")
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            torn = torn or f"line {number} is not a journal line"
            continue
        if line["type"] == "attempt":
            pending.append(line)
            continue
        unit = line["unit"]
        bodies = [{k: v for k, v in p.items() if k not in ("type", "unit")} for p in pending]
        if torn is None and any(p["unit"] != unit for p in pending):
            torn = f"line {number} commits a unit whose lines are mixed with another's"
        if torn is None and (len(bodies) != line["count"] or digest(bodies) != line["sha256"]):
            torn = f"line {number} commits other attempts than those before it"
        if torn is None and unit in units:
            torn = f"line {number} commits a unit for the second time"
        if torn is not None:
            # A commit follows the damage, so this is not the tail of a killed run.
            raise ValueError(
                f"journal {name!r} is damaged: {torn}; restore it, or start with a new file"
            )
        units[unit] = _Unit(line["content"], [Attempt.from_dict(b) for b in bodies])
        pending, end = [], position
    return units, end


class Journal:
    """Append-only JSONL of attempts; survives ``kill -9``.

    Opening one takes a lock, and cuts off what an interrupted run left behind its last commit.
    Use ``read_attempts`` to look at a journal that another process is writing.

    Raises ``ValueError`` where the file is damaged or another process writes to it.
    """

    FORMAT: ClassVar[int] = 2
    """Of what a run's units are known by; stands in each of them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        try:
            self._lock()
            self._units, self._end = _scan(self._file.readall(), self.path.name)
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if sys.platform == "win32":  # no flock: one writer per journal is up to the user
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"journal {self.path.name!r} is being written by another run: "
                "wait for it, or use another folder"
            ) from error

    def done(self, unit: Mapping[str, Any]) -> list[Attempt] | None:
        """Attempts of a committed unit, in the order written; None if it is still to do."""
        found = self._units.get(digest(dict(unit)))
        return None if found is None else list(found.attempts)

    def write(self, unit: Mapping[str, Any], attempts: Sequence[Attempt]) -> None:
        """Appends and commits one unit; on disk when this returns.

        Raises ``ValueError`` if the unit was committed before, or if two attempts share a key.
        """
        content = json.loads(canonical(dict(unit)))
        identity = digest(content)
        if identity in self._units:
            raise ValueError(
                f"unit {canonical(content)} is committed already: ask `done(unit)` first, "
                "or put what changed into the unit"
            )
        seen: set[str] = set()
        for attempt in attempts:
            if attempt.key in seen:
                raise ValueError(
                    f"two attempts of one unit share the key {attempt.key[:12]} "
                    f"({attempt.record!r}, {attempt.field!r}): tell them apart in `field`"
                )
            seen.add(attempt.key)
        bodies = [a.to_dict() for a in attempts]
        lines = [canonical({"type": "attempt", "unit": identity} | b) for b in bodies]
        commit = {"count": len(bodies), "sha256": digest(bodies), "content": content}
        lines.append(canonical({"type": "commit", "unit": identity} | commit))
        self._append("".join(f"{line}\n" for line in lines).encode())
        self._units[identity] = _Unit(content, list(attempts))

    def _append(self, payload: bytes) -> None:
        view = memoryview(payload)
        self._file.seek(self._end)
        try:
            while view:  # an unbuffered write may take only a part
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._end)  # a full disk must not leave half a unit behind
            raise
        self._end += len(payload)

    def units(self) -> list[dict[str, Any]]:
        """Committed units, in the order written."""
        return [dict(u.content) for u in self._units.values()]

    def attempts(self) -> list[Attempt]:
        """All committed attempts, in the order written."""
        return [a for u in self._units.values() for a in u.attempts]

    def __len__(self) -> int:
        return len(self._units)

    def close(self) -> None:
        """Gives the lock back."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_attempts(path: str | os.PathLike[str]) -> list[Attempt]:
    """Committed attempts of a journal, without locking or changing it.

    Raises ``ValueError`` where the file is damaged, ``FileNotFoundError`` where there is none.
    """
    units, _ = _scan(Path(path).read_bytes(), Path(path).name)
    return [a for u in units.values() for a in u.attempts]
