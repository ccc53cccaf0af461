"""How often the nano agent answers right: held-out records, values never seen in training."""

from __future__ import annotations

from typing import Any

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.generator import GeneratorConfig, make_scenario
from lcguard.agents.scenarios.types import hops_of


def accuracy(model: str, n_records: int, seed: int = 77) -> dict[str, Any]:
    """Exact-match share of greedy answers by kind of question, and the weakest fields."""
    backend = load_backend(model)
    config = GeneratorConfig(seed=seed, split="test")
    hops = hops_of(make_scenario(config, i) for i in range(n_records))[:n_records]
    records = backend.encoder.encode(hops)
    kv = backend.source.prefill([r.ids for r in records])
    right = backend.source.exact_match(records, kv)
    kinds: dict[str, list[bool]] = {}
    fields: dict[str, list[bool]] = {}
    for record, row in zip(records, right, strict=True):
        for q, ok in zip(record.questions, row, strict=True):
            kinds.setdefault(q.kind, []).append(ok)
            fields.setdefault(f"{q.field} ({q.kind})", []).append(ok)
    shares = {k: sum(v) / len(v) for k, v in fields.items() if len(v) >= 20}
    return {
        "records": len(records),
        "split": "test",
        "seed": seed,
        "accuracy": {k: round(sum(v) / len(v), 4) for k, v in sorted(kinds.items())},
        "questions": {k: len(v) for k, v in sorted(kinds.items())},
        "weakest": {k: round(shares[k], 3) for k in sorted(shares, key=lambda k: shares[k])[:8]},
    }
