"""Canaries without a proxy: the server's records and attack on a guard that runs on transformers.

What a canary worker sees of an edge is the guard's output on planted records. Where the guard's
weights are at hand the same segments are made here, so that a leak can be taken apart by category,
and a guard be screened that no engine runs yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lcguard.agents.backends.hf import HFBackend
from lcguard.canonical import canonical_digest
from lcguard.commands.canary_records import fitting_records, screening_records
from lcguard.commands.canary_screen import Reading, screen
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import AttackData
from lcguard.records import TokenRecord
from lcguard.server.leakage.meter import EdgeName
from lcguard.training.dataset import attack_data, guard_all


@dataclass(frozen=True)
class ScreenConfig:
    """A screening, as ``canaries`` of ``server.yaml`` says it."""

    attack: Literal["probe", "linear"] = "probe"
    train_records: int = 96
    test_records: int = 64
    level: float = 0.95


def screening(
    backend: HFBackend,
    guard: FrozenGuard,
    forbid: Sequence[str],
    config: ScreenConfig,
    seed: int,
    limit: float,
) -> Reading:
    """Plants records, guards them, and attacks what comes out. Raises ``ValueError`` where the
    attack has nothing to say."""
    test = screening_records(backend.encoder, forbid, config.test_records, seed + 1)
    train = fitting_records(backend.encoder, forbid, config.train_records, seed)
    fitted_on = _guarded(backend, guard, train, seed)
    tried_on = _guarded(backend, guard, test, seed + 1)
    return screen(fitted_on, tried_on, config.attack, seed=seed, level=config.level, limit=limit)


def as_result(
    found: Reading, edge: EdgeName, guard: FrozenGuard, forbid: Sequence[str], attack: str
) -> dict[str, Any]:
    """A reading as a canary worker says it of an edge, for the leakage meter."""
    tenant, source, audience = edge
    return {
        **found.figures._asdict(),
        "tenant": tenant,
        "source": source,
        "audience": audience,
        "attack": f"{attack} on {found.category}" if found.category else attack,
        "guard": guard.name,
        "guard_digest": guard.digest,
        "policy_digest": canonical_digest(["forbid", *forbid]),
    }


def _guarded(
    backend: HFBackend, guard: FrozenGuard, records: Sequence[TokenRecord], seed: int
) -> AttackData:
    raw = backend.source.prefill([r.ids for r in records])
    kv = guard_all(guard, records, raw, backend.source, backend.special, seed=seed)
    return attack_data(records, kv, backend.special)
