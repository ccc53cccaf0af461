"""``lcguard eval certify``: a guard's certificate, taken anew on records that no training saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import load_backend
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.categories import CATEGORIES
from lcguard.config import load_config
from lcguard.evaluation.load import hops_for, known_values, load_guard
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.guards.shipped import guard_folder
from lcguard.training.certificate import certify
from lcguard.training.dataset import with_policy
from lcguard.training.secret_ceiling import REFERENCES


@dataclass(frozen=True)
class CertifyRun:
    """What a certificate is taken on; ``--set`` changes it."""

    model: str = "nano"
    data: DataConfig = field(
        default_factory=lambda: DataConfig(seed=5000, train_records=1000, test_records=1000)
    )
    """Certified on ``test``; of records that nobody generates, ``train`` says what values are like.
    """
    level: float = 0.95
    seed: int = 1
    pairs: int = 400
    """Records for the nats of whole records."""
    references: int = REFERENCES
    """Contexts that each secret's is compared with."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level} must be at least 0.5 and below 1")
        for name in ("pairs", "references"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2")


def certify_guard(
    guard: str,
    sets: Sequence[str],
    data: Path | None,
    command: str,
    out: Path | None = None,
    card: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Certifies with everything forbidden; returns the certificate.

    Args:
        guard: folder or MODEL:NAME.
        out: JSON with the certificate and what it was made of.
        card: write it onto the guard's card too.

    Raises ``ValueError`` for a guard of which a pair leak says nothing, or without records.
    """
    given = [*sets, *([f"data.path={data}"] if data else [])]
    run = load_config(CertifyRun, None, given, base=CertifyRun())
    backend = load_backend(run.model, device)
    frozen = load_guard(GuardSpec("guard", path=guard), backend)
    if frozen.needs_twin:
        raise ValueError(f"guard {guard!r} sends a twin's KV, of which a pair leak says nothing")
    train, test = (backend.encoder.encode(hops) for hops in hops_for(run.data))
    if not test:
        raise ValueError(f"{run.data.source}: no records to certify with")
    found = certify(
        frozen.module,
        with_policy(test, CATEGORIES),
        backend.source,
        level=run.level,
        seed=run.seed,
        known=known_values(run.data, backend, train),
        references=run.references,
        pairs=run.pairs,
    )
    if found is None:
        raise ValueError(f"guard {guard!r} adds no noise: whatever it sends, it tells for certain")
    certificate = found.to_dict()
    if out is not None:
        whole = {
            "title": f"Certificate of {guard}",
            "guard": guard,
            "guard_digest": frozen.digest,
            "certificate": certificate,
            "data": {"source": run.data.source, "seed": run.data.seed, "test_records": len(test)},
            **run_manifest(command, [run.seed], run),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(whole, indent=1, default=str) + "\n").encode(), mode=PUBLIC)
    if card:
        frozen.with_card(certificate=certificate).save_pretrained(guard_folder(guard))
    return certificate
