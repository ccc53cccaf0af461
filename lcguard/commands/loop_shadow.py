"""Shadow mode: a candidate guards beside the live guard, and what comes out of it goes nowhere.

Both get the same planted records and the same attack, fitted afresh on each: what they leak and
what they cost stands side by side before anybody decides. No segment leaves this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer

from lcguard.agents.backends.hf import HFBackend
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.categories import CATEGORIES
from lcguard.commands.canary_records import fitting_records, screening_records
from lcguard.commands.canary_screen import Screened, screen
from lcguard.commands.loop_config import LoopConfig
from lcguard.evaluation.hop_segments import is_task
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord
from lcguard.training.dataset import attack_data, guard_all

SHADOW = "shadow.json"


class Side(BaseModel):
    """One of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    leaked: Screened
    """Of all values, or of the one category that leaks by itself."""
    category: str
    by_category: dict[str, Screened]
    utility: float | None
    """Share of task questions that the receiver answers right from the segment."""
    ms: float
    """Of guarding a segment, on this machine beside whatever else it did."""

    @field_serializer("leaked")
    def _named(self, found: Screened) -> dict[str, Any]:
        return found._asdict()

    @field_serializer("by_category")
    def _all_named(self, found: dict[str, Screened]) -> dict[str, Any]:
        return {category: s._asdict() for category, s in found.items()}


class Shadow(BaseModel):
    """Live and candidate on the same records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    live: Side
    candidate: Side

    def lines(self) -> list[str]:
        """For people."""
        out = []
        for name, side in (("live", self.live), ("candidate", self.candidate)):
            s, what = side.leaked, f" of {side.category}" if side.category else ""
            right = "not measured" if side.utility is None else f"{side.utility:.1%}"
            out.append(
                f"{name} {side.digest[:12]}: {s.recovered} of {s.n_secrets} values{what} read, at "
                f"most {s.asr_high:.0%}; task answers right {right}; {side.ms:.2g} ms a segment"
            )
        return out


def shadow(
    config: LoopConfig,
    backend: HFBackend,
    live: FrozenGuard,
    candidate: FrozenGuard,
    out: Path,
    forbid: Sequence[str] = CATEGORIES,
) -> Shadow:
    """Guards the same records with both and writes ``out/shadow.json``."""
    c, seed = config.screen, config.seed + 31
    train = fitting_records(backend.encoder, forbid, c.train_records, seed)
    test = screening_records(backend.encoder, forbid, c.test_records, seed + 1)
    raw = [backend.source.prefill([r.ids for r in records]) for records in (train, test)]
    both = [_side(config, backend, guard, (train, test), raw, seed) for guard in (live, candidate)]
    found = Shadow(live=both[0], candidate=both[1])
    out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = found.model_dump(mode="json")
    replace_file(out / SHADOW, (json.dumps(data, indent=1) + "\n").encode(), mode=PUBLIC)
    return found


def _side(
    config: LoopConfig,
    backend: HFBackend,
    guard: FrozenGuard,
    records: tuple[list[TokenRecord], list[TokenRecord]],
    raw: list[KVBatch],
    seed: int,
) -> Side:
    guarded, spent_s = [], 0.0
    for i, (rows, kv) in enumerate(zip(records, raw, strict=True)):
        started = time.perf_counter()
        guarded.append(guard_all(guard, rows, kv, backend.source, backend.special, seed=seed + i))
        spent_s += time.perf_counter() - started
    pairs = [attack_data(r, kv, backend.special) for r, kv in zip(records, guarded, strict=True)]
    found = screen(
        pairs[0],
        pairs[1],
        config.screen.attack,
        seed=seed,
        level=config.screen.level,
        limit=config.limit,
    )
    answers = backend.source.exact_match(records[1], guard.opened(guarded[1]), is_task)
    right = [x for row in answers for x in row]
    return Side(
        digest=guard.digest,
        leaked=found.figures,
        category=found.category,
        by_category=found.by_category,
        utility=sum(right) / len(right) if right else None,
        ms=1e3 * spent_s / sum(map(len, records)),
    )
