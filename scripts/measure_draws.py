"""What several publishes of one record let the optimal attacker read.

N independent draws of a segment are worth one with the noise divided by the root of N. For every
secret the attack ``likelihood`` gives the guard's mean under each candidate; how often the true one
then comes first follows from the means' inner products alone, and is computed by drawing the noise
of the comparison many times. Intervals are over the secrets.

python scripts/measure_draws.py --out benchmarks/results/draws.json
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcguard.agents.backends.hf import load_backend
from lcguard.attacks.likelihood import LikelihoodAttack
from lcguard.commands.script import run_script, script_parser
from lcguard.evaluation.intervals import cluster_bootstrap
from lcguard.evaluation.load import hops_for, load_guard, make_attack
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import AttackSpec, DataConfig, GuardSpec
from lcguard.training.dataset import attack_data, guard_all

DRAWS = (1, 2, 4, 16, 64)
LISTS = (10, 100, 400, 1000)
TRIALS = 1000


def first_rates(means: Tensor, sizes: Sequence[int], draws: Sequence[int], seed: int) -> Tensor:
    """How often the first of ``means [N, ...]``, in units of the noise, is the likeliest: one rate
    for each number of draws and size of list."""
    apart = (means - means[:1]).flatten(1)
    gram = (apart @ apart.T).double()
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()  # of the covariance of all comparisons
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(TRIALS, len(gram), generator=generator, dtype=torch.float64) @ root.T
    rates = torch.empty(len(draws), len(sizes), dtype=torch.float64)
    for i, n in enumerate(draws):
        ahead = noise * n**0.5 - n * gram.diagonal() / 2  # over the true one, in nats
        for j, size in enumerate(sizes):
            others = ahead[:, 1:size]
            rates[i, j] = (others < 0).all(1).double().mean() if others.shape[1] else 1.0
    return rates


def measure(guard_path: str, secrets: int, data_seed: int) -> dict[str, Any]:
    """Figures by number of draws and size of list; as many secrets of each category as given."""
    backend = load_backend("nano")
    guard = load_guard(GuardSpec("guard", path=guard_path), backend)
    hops = hops_for(DataConfig(seed=data_seed, train_records=8, test_records=240))
    train, test = (
        attack_data(
            records,
            guard_all(
                guard,
                records,
                backend.source.prefill([r.ids for r in records]),
                backend.source,
                backend.special,
                seed=i,
            ),
            backend.special,
        )
        for i, records in enumerate(backend.encoder.encode(h) for h in hops)
    )
    spec = AttackSpec("likelihood", "likelihood", {"lists": LISTS})
    attack = make_attack(backend, spec, guard).fit(train)
    assert isinstance(attack, LikelihoodAttack)
    wanted = [(i, k) for i, row in enumerate(test.secrets) for k in range(len(row))]
    random.Random(0).shuffle(wanted)
    taken: dict[str, int] = {}
    rates, sizes, names, records = [], [], [], []
    for i, k in wanted:
        category = test.secrets[i][k].category
        if taken.get(category, 0) < secrets:
            taken[category] = taken.get(category, 0) + 1
            means = attack.candidate_means(test, i, k, max(LISTS))
            rates.append(first_rates(means, LISTS, DRAWS, len(rates)).numpy())
            sizes.append([min(n, len(means)) for n in LISTS])
            names.append(category)
            records.append(test.record_ids[i])
    return {
        "guard": guard_path,
        "guard_digest": guard.digest,
        "lists": list(LISTS),
        "secrets": len(names),
        "draws": {
            str(n): {
                str(size): _figures(
                    [float(r[a, b]) for r in rates], [s[b] for s in sizes], names, records
                )
                for b, size in enumerate(LISTS)
            }
            for a, n in enumerate(DRAWS)
        },
    }


def _figures(
    rates: Sequence[float], sizes: Sequence[int], names: Sequence[str], records: Sequence[str]
) -> dict[str, Any]:
    """As many secrets of each category: the plain mean is the mean over categories."""
    found = cluster_bootstrap(rates, records, 0, 2000, 0.95)
    return {
        "asr": found.value,
        "ci": found.ci,
        "floor": float(np.mean([1 / n for n in sizes])),
        "by_category": {
            name: float(np.mean([r for r, c in zip(rates, names, strict=True) if c == name]))
            for name in sorted(set(names))
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__, guard="nano:gate", secrets=(6, "of each category"), seed=(2000, "of the records")
    )
    args = parser.parse_args(argv)
    found = measure(args.guard, args.secrets, args.seed)
    command = f"python scripts/measure_draws.py --secrets {args.secrets}"
    options = {k: str(v) for k, v in vars(args).items()}
    text = json.dumps({**run_manifest(command, [0], options), **found}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    run_script(main)
