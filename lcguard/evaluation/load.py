"""What an evaluation or a training run is made of: records, guards that fit the model, attacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcguard.agents.backends.hf import HFBackend
from lcguard.agents.scenarios.load import load_hops, split_hops
from lcguard.agents.scenarios.schema import sample_banded, sample_value
from lcguard.agents.scenarios.types import Hop
from lcguard.attacks.base import BaseAttack, Knowledge, attack_class
from lcguard.categories import CATEGORIES
from lcguard.evaluation.plan import AttackSpec, DataConfig, GuardSpec
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.erasure import ErasureGuard
from lcguard.records import TokenRecord
from lcguard.training.fit_erasure import fit_erasure
from lcguard.training.known_values import KnownValues, RecordValues, SampledValues


def load_guard(spec: GuardSpec, backend: HFBackend) -> FrozenGuard:
    """A guard that fits the backend's model and revision; anything else is refused."""
    if bool(spec.guard) == bool(spec.path):
        raise ValueError(f"guard {spec.name!r}: give either guard (a name) or path, not both")
    if spec.path:
        saved = FrozenGuard.from_pretrained(
            spec.path, model_digest=backend.digest, shape=backend.source.shape
        )
        return saved.with_options(**spec.options) if spec.options else saved
    cls = guard_class(spec.guard)
    if cls.trained:
        raise ValueError(f"guard {spec.name!r}: {spec.guard!r} is trained; give path to its folder")
    module = cls.build(KVShape(*backend.source.shape), len(CATEGORIES), dict(spec.options))
    return FrozenGuard(module)


def fit_plain_guards(
    guards: dict[str, FrozenGuard], backend: HFBackend, records: Sequence[TokenRecord]
) -> None:
    """Channel statistics for guards without weights of their own: Gaussian noise is per channel.
    Erasers, on their own or as a part, learn their concepts from the records."""
    plain = [g for g in guards.values() if not g.module.trained]
    if plain:
        raw = backend.source.prefill([r.ids for r in records[:256]])
        for guard in plain:
            if any(isinstance(part, ErasureGuard) for part in guard.module.modules()):
                fit_erasure(guard.module, records, backend.source)
            guard.module.fit_statistics(raw)


def make_attack(
    backend: HFBackend,
    spec: AttackSpec,
    guard: FrozenGuard | None = None,
    *,
    stop_at: float | None = None,
    start: BaseAttack | None = None,
) -> BaseAttack:
    """An attack, not fitted yet, that knows model and guard.

    Args:
        stop_at: ends the fitting of one that recovers this share of its own held-back pairs.
        start: what it starts from, warm.
    """
    cls = attack_class(spec.attack)
    attack = cls.build({k: v for k, v in spec.options.items() if k != "fit"})
    attack.reschedule(**spec.options.get("fit", {}))
    if stop_at is not None:
        attack.reschedule(stop_at=stop_at)
    if start is not None:
        attack.start_from(start)
    encoder = backend.encoder
    attack.equip(
        Knowledge(
            source=backend.source,
            decode=backend.decode,
            guard=guard,
            prompt=encoder.prompt,
            encode=encoder.ids,
            sample=sample_value,
        )
    )
    return attack


def hops_for(data: DataConfig) -> tuple[list[Hop], list[Hop]]:
    """Attackers' and victims' hops; no scenario is in both."""
    if data.source == "generator":
        # coined names: attackers and guards have to read tokens, not to recognise names
        wanted = (
            ("coined", data.train_records, data.seed),
            ("test", data.test_records, data.seed + 1),
        )
        train, test = (
            load_hops(
                "generator",
                path=None,
                seed=seed,
                split=split,
                n=n,
                min_fields=data.min_fields,
                max_fields=data.max_fields,
                forms=data.forms,
            )[:n]
            for split, n, seed in wanted
        )
        return train, test
    path = Path(data.path) if data.path else None
    hops = load_hops(
        data.source,
        path=path,
        seed=data.seed,
        split="test",
        n=None,
        min_fields=data.min_fields,
        max_fields=data.max_fields,
    )
    n, m = data.train_records, data.test_records
    if data.train_share is None:
        train, test = split_hops(hops, n / (n + m), data.seed)
        return train[:n], test[:m]
    train, test = split_hops(hops, data.train_share, data.seed)
    return _evenly(train, n), _evenly(test, m)


def known_values(data: DataConfig, backend: HFBackend, train: Sequence[TokenRecord]) -> KnownValues:
    """What values are like, for a certificate on the test records: from the generator that made
    them, else from the training records, of which none is among them."""
    if data.source != "generator":
        return RecordValues(train)
    return SampledValues(sample_banded, backend.encoder.ids, backend.decode)


def _evenly(hops: list[Hop], n: int) -> list[Hop]:
    """``n`` of them, or all, evenly over the list, in which a scenario's stand together."""
    return hops if n >= len(hops) else [hops[i * len(hops) // n] for i in range(n)]
