"""Time of an attack by descent with predicted and with true gradients, paired; prints JSON.

Both recover the same unguarded segments of the nano agent, in turn, so that a busy machine slows
both: ``python scripts/bench_screening.py --records 16 --rounds 3``. ``layers`` runs both once more
on the first layers alone. Figures: seconds of one recovery (median), exact match, cosine of
predicted and true gradients on held-out records.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from lcguard.agents.backends.hf import load_backend
from lcguard.attacks.base import Knowledge
from lcguard.attacks.gradient_prediction import GradientPredictionAttack
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.plan import DataConfig
from lcguard.protocols import AttackData
from lcguard.training.dataset import attack_data, with_policy


def compare(attacks: dict[str, Any], data: AttackData, rounds: int) -> dict[str, Any]:
    """Recovers with each attack in turn, ``rounds`` times."""
    truth = [s.ids for row in data.secrets for s in row]
    seconds: dict[str, list[float]] = {name: [] for name in attacks}
    match = {}
    for _ in range(rounds):
        for name, attack in attacks.items():
            started = time.perf_counter()
            guesses = attack.recover(data)
            seconds[name].append(time.perf_counter() - started)
            match[name] = sum(g.ids == ids for g, ids in zip(guesses, truth, strict=True))
    pairs = zip(seconds["true"], seconds["predicted"], strict=True)
    return {
        "speed_up": round(statistics.median(t / p for t, p in pairs), 3),
        "seconds": {n: round(statistics.median(s), 3) for n, s in seconds.items()},
        "asr": {n: round(m / len(truth), 4) for n, m in match.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, model="nano", records=16, steps=40, rounds=3, layers=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    backend = load_backend(args.model)
    train, test = (
        with_policy(backend.encoder.encode(hops), CATEGORIES)
        for hops in hops_for(DataConfig(train_records=2 * args.records, test_records=args.records))
    )
    own, theirs = (
        attack_data(rs, backend.source.prefill([r.ids for r in rs]), backend.special)
        for rs in (train, test)
    )
    out: dict[str, Any] = {"model": args.model, "records": len(test), "steps": args.steps}
    for layers in dict.fromkeys((0, args.layers)):
        attacks = {}
        for mode in ("predicted", "true"):
            options = {"mode": mode, "steps": args.steps, "layers": layers}
            attacks[mode] = GradientPredictionAttack.build(options)
            attacks[mode].equip(Knowledge(backend.source, backend.decode))
            attacks[mode].fit(own)
        figures = compare(attacks, theirs, args.rounds)
        figures["cosine"] = round(attacks["predicted"].gradient_cosine(theirs), 4)
        out[f"layers {layers or 'all'}"] = figures
    print(json.dumps(out, indent=1))
    command = f"python scripts/bench_screening.py --records {args.records} --rounds {args.rounds}"
    write_report(args, "Descent by predicted and by true gradients", command, out)
    return 0


if __name__ == "__main__":
    run_script(main)
