"""What the leakage meter keeps of an edge, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lcguard.atomic_file import replace_file

State = Literal["open", "closed"]
EdgeName = tuple[str, str, str]
"""Tenant, source and audience."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", strict=True)


class LeakageError(RuntimeError):
    """A state file that cannot be read or written. One line with the fix."""


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


@dataclass(frozen=True, config=_STRICT)
class _File:
    version: Literal[1]
    edges: tuple[EdgeLeakage, ...]


_ADAPTER = TypeAdapter(_File)


def load_state(path: Path) -> dict[EdgeName, EdgeLeakage]:
    """The edges of a state file; none where there is no file.

    Raises ``LeakageError`` for one that cannot be read: it may say which edges are closed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LeakageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        edges = _ADAPTER.validate_json(data).edges
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise LeakageError(
            f"{path}: {where}: {first['msg']}; it says which edges are closed, so put back a copy, "
            "or remove it to open them all until the next canaries"
        ) from None
    return {edge.name: edge for edge in edges}


def save_state(path: Path, edges: Mapping[EdgeName, EdgeLeakage]) -> None:
    """Replaces the file whole, durably, readable by its owner alone. Raises ``LeakageError``."""
    data = _ADAPTER.dump_json(_File(1, tuple(e for _, e in sorted(edges.items()))))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise LeakageError(
            f"{path}: cannot be written: {error.strerror}; a restart would forget what it lacks"
        ) from None
