"""What the leakage meter keeps of an edge, and its row."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lcguard.server.database.connection import Connection

State = Literal["open", "closed"]
EdgeName = tuple[str, str, str]
"""Tenant, source and audience."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)
_NAMED = "tenant = ? AND source = ? AND audience = ?"


class LeakageError(RuntimeError):
    """A stored state that cannot be read. One line with the fix."""


class Screening(BaseModel):
    """What the worker says of one edge. Every figure must fit the others: a NaN or a missing
    bound would pass for clean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str
    source: str
    audience: str
    n_secrets: Annotated[int, Field(ge=0)] = 0
    """Planted values that the attack could be scored on."""
    recovered: Annotated[int, Field(ge=0)] = 0
    asr: Share = 0.0
    asr_low: Share = 0.0
    asr_high: Share = 1.0
    floor: Share = 0.0
    """ASR of the same attack on segments of other records."""
    attack: str = ""
    seconds: Seconds = 0.0
    guard: str = ""
    guard_digest: str = ""
    policy_digest: str = ""
    shared_with: str = ""
    """Edge on which the records were planted, where it was another one: same guard, same rule."""
    skipped: str | None = None
    """Why there was nothing to screen."""

    @property
    def name(self) -> EdgeName:
        return self.tenant, self.source, self.audience

    @model_validator(mode="after")
    def _consistent(self) -> Screening:
        if self.skipped is not None:
            if self.n_secrets:
                raise ValueError(f"skipped with n_secrets={self.n_secrets}")
            return self
        if not (self.n_secrets and self.attack and self.guard_digest and self.policy_digest):
            raise ValueError("n_secrets, attack, guard_digest and policy_digest are needed")
        if self.recovered > self.n_secrets or not self.asr_low <= self.asr <= self.asr_high:
            raise ValueError(
                f"{self.recovered} of {self.n_secrets}, asr {self.asr} in [{self.asr_low}, "
                f"{self.asr_high}] do not fit"
            )
        if abs(self.asr - self.recovered / self.n_secrets) > 1e-6:
            raise ValueError(f"asr {self.asr} is not {self.recovered} of {self.n_secrets}")
        return self


@dataclass(frozen=True, config=_STRICT)
class Point:
    """One screening of the past."""

    at_s: Seconds
    """Unix time."""
    asr: Share
    low: Share
    high: Share


@dataclass(frozen=True, config=_STRICT)
class EdgeLeakage:
    """An edge and its last screening; None is what was not measured."""

    tenant: str
    source: str
    audience: str
    since_s: Seconds
    """Unix time at which the meter first heard of the edge."""
    state: State = "open"
    reason: str = ""
    """Why it is closed, or was opened."""
    asr: Share | None = None
    asr_low: Share | None = None
    asr_high: Share | None = None
    floor: Share | None = None
    n_secrets: int | None = None
    recovered: int | None = None
    attack: str = ""
    guard: str = ""
    guard_digest: str = ""
    policy_digest: str = ""
    shared_with: str = ""
    skipped: str = ""
    seconds: Seconds = 0.0
    """Duration of the screening."""
    measured_at_s: Seconds | None = None
    """Unix time of the last screening."""
    stale: bool = False
    """No screening for three intervals."""
    error: str = ""
    """Why the last attempt to screen failed; empty after one that did not."""
    error_at_s: Seconds | None = None
    closed_at_s: Seconds | None = None
    """Unix time at which it was last closed."""
    closed_guard_digest: str = ""
    closed_policy_digest: str = ""
    clean_runs: int = 0
    """Clean screenings since it was closed."""
    history: tuple[Point, ...] = field(default=())
    """Oldest first."""

    @property
    def name(self) -> EdgeName:
        return self.tenant, self.source, self.audience


_EDGE = TypeAdapter(EdgeLeakage)


def all_edges(connection: Connection) -> dict[EdgeName, EdgeLeakage]:
    """Every edge that was screened, by name. Raises ``LeakageError`` for a row that was altered:
    it may say that its edge is closed."""
    rows = connection.execute("SELECT tenant, source, audience, screened FROM edges").fetchall()
    return {name: _edge(name, text) for *names, text in sorted(rows) if (name := tuple(names))}


def stored_edge(connection: Connection, name: EdgeName) -> EdgeLeakage | None:
    """One of them. Raises as ``all_edges``."""
    row = connection.execute(f"SELECT screened FROM edges WHERE {_NAMED}", name).fetchone()
    return None if row is None else _edge(name, row[0])


def stored_state(connection: Connection, name: EdgeName) -> State:
    """``open`` for an edge that was never screened, ``closed`` for whatever is not ``open``."""
    row = connection.execute(f"SELECT state FROM edges WHERE {_NAMED}", name).fetchone()
    return "open" if row is None or row[0] == "open" else "closed"


def store_edge(connection: Connection, edge: EdgeLeakage) -> None:
    """In place of what was there."""
    connection.execute(
        "INSERT INTO edges (tenant, source, audience, state, screened) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (tenant, source, audience) "
        "DO UPDATE SET state = EXCLUDED.state, screened = EXCLUDED.screened",
        (*edge.name, edge.state, _EDGE.dump_json(edge).decode()),
    )


def _edge(name: EdgeName, text: str) -> EdgeLeakage:
    try:
        edge = _EDGE.validate_json(text)
        if edge.name != name:
            raise ValueError("it is another edge's")
    except ValueError as error:
        why = _first(error) if isinstance(error, ValidationError) else str(error)
        raise LeakageError(
            f"table edges, {'/'.join(name)}: {why}; it says whether the edge is closed, so restore "
            "it, or delete the row to open the edge until the next canaries"
        ) from None
    return edge


# --- the file in which releases before kept it ---


@dataclass(frozen=True, config=_STRICT)
class _File:
    version: Literal[1]
    edges: tuple[EdgeLeakage, ...]


_FILE = TypeAdapter(_File)


def load_file(path: Path) -> tuple[EdgeLeakage, ...]:
    """The edges of ``leakage.json``; none where there is none.

    Raises ``LeakageError`` for one that cannot be read: it may say which edges are closed.
    """
    try:
        return _FILE.validate_json(path.read_bytes()).edges
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise LeakageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise LeakageError(
            f"{path}: {_first(error)}; it says which edges are closed, so put back a copy, "
            "or remove it to open them all until the next canaries"
        ) from None


def adopt(connection: Connection, edges: tuple[EdgeLeakage, ...]) -> None:
    """Stores what a file had; an edge that is closed in either place is closed."""
    for edge in edges:
        known = stored_edge(connection, edge.name)
        if known is None or edge.state == "closed":
            store_edge(connection, edge)


def retire_file(path: Path) -> None:
    """Once its edges are stored; the release before would not look at another name."""
    os.replace(path, path.with_name(f"{path.name}.stored"))


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, found["loc"])) or "JSON"
    return f"{where}: {found['msg']}"
