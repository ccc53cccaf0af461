"""What changes in the course of a run: phases, each with other weights, rates or noise.

A phase is a share of the run's steps, so that ``steps`` alone makes a run shorter or longer. What a
phase leaves out is the run's own setting. A last phase of share 0 has no steps: it says with how
much noise the guard is finished.

Weights that are averaged, equally (Izmailov et al., arXiv 1803.05407) or by a decay, pass more at
the same leak than the last ones do, in place of an average of two runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Phase:
    """A part of a run; a setting that is not given is the run's."""

    share: float
    """Of the run's steps; those of all phases add up to 1."""
    average: bool = False
    """The run ends with the average of the weights after each of these steps: an equal one, or
    with ``ema`` the running one."""
    noise: float | None = None
    """Of the guard, in place of ``options``' own."""
    lr: float | None = None
    muon_lr: float | None = None
    kl_weight: float | None = None
    ce_weight: float | None = None
    band_weight: float | None = None
    allowed_weight: float | None = None
    pair_weight: float | None = None
    tail_weight: float | None = None
    gate_weight: float | None = None
    label_weight: float | None = None
    open_weight: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be within 0..1")

    def changes(self) -> dict[str, Any]:
        """The settings that it gives, ``noise`` apart."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in own.items() if v is not None and k not in _OWN}


_OWN = ("share", "average", "noise")


def check_schedule(phases: Sequence[Phase]) -> None:
    """Raises ``ValueError`` for shares that do not add up to 1."""
    total = sum(p.share for p in phases)
    if phases and abs(total - 1) > 1e-6:
        raise ValueError(f"the schedule's shares add up to {total:g}: they have to make 1")


def phase_at(phases: Sequence[Phase], step: int, steps: int) -> Phase | None:
    """The phase that a step is in, the last one from ``steps`` on; None without phases."""
    if not phases or step >= steps:
        return phases[-1] if phases else None
    end = 0.0
    for phase in phases:
        end += phase.share
        if step < round(end * steps):
            return phase
    return phases[-1]
