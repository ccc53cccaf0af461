"""A fair search for the published guard before we print that it fails.

    python scripts/search_residual.py --out benchmarks/results/residual_search.json

Bottleneck width, beta, steps, attacker lag and objective are varied around the paper's recipe
(which does not state them). Every run is judged on validation records that no evaluation uses: its
utility, what its own attacker recovers, and what a fresh probe and a fresh decoder recover. The
run with the lowest fresh ASR among those that keep 95% of the utility is chosen. Runs already in
the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.attacks.base import FitConfig
from lcguard.attacks.decoder import DecoderAttack
from lcguard.attacks.probe import ProbeAttack
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script
from lcguard.commands.train import TrainRun, adversary_factory, held_out_figures, recovered
from lcguard.config import load_config
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.plan import DataConfig
from lcguard.evaluation.presets import preset
from lcguard.records import TokenRecord
from lcguard.training.dataset import attack_data, guard_all, with_policy
from lcguard.training.trainer import Run, train_guard

GRID: tuple[dict[str, Any], ...] = (
    {"bottleneck": 24, "beta": 0.3, "steps": 120, "lag": 1, "objective": "ce"},
    {"bottleneck": 24, "beta": 1.0, "steps": 120, "lag": 1, "objective": "ce"},
    {"bottleneck": 8, "beta": 0.3, "steps": 120, "lag": 1, "objective": "ce"},
    {"bottleneck": 64, "beta": 0.3, "steps": 240, "lag": 4, "objective": "ce"},
    {"bottleneck": 64, "beta": 3.0, "steps": 120, "lag": 1, "objective": "ce"},
    {"bottleneck": 64, "beta": 1.0, "steps": 120, "lag": 1, "objective": "kl_prior"},
)
BROKEN = 0.9


def judge(done: Run, backend: HFBackend, data: DataConfig) -> dict[str, float]:
    """Fresh ASR on validation records, mean over categories."""
    attacker, victim = (
        with_policy(backend.encoder.encode(hops), CATEGORIES)
        for hops in hops_for(replace(data, seed=data.seed + 50, train_records=600))
    )
    pairs = []
    for i, records in enumerate((attacker, victim)):
        raw = backend.source.prefill([r.ids for r in records])
        kv = guard_all(done.guard, records, raw, backend.source, backend.special, seed=i)
        pairs.append(attack_data(records, kv, backend.special))
    found = {"probe": recovered(ProbeAttack().fit(pairs[0]), pairs[1])}
    if found["probe"] < BROKEN:  # else the cheap attack has answered the question
        decoder = DecoderAttack(DecoderAttack.Config(fit=FitConfig(steps=300, stop_at=0.95)))
        found["decoder"] = recovered(decoder.fit(pairs[0]), pairs[1])
    return found


def one(
    setting: dict[str, Any],
    run: TrainRun,
    backend: HFBackend,
    train: list[TokenRecord],
    held_out: list[TokenRecord],
) -> dict[str, Any]:
    """Trains one setting and judges it."""
    adversary = replace(
        run.train.adversary,
        weight=setting["beta"],
        lag=setting["lag"],
        objective=setting["objective"],
    )
    config = replace(
        run.train,
        options={"bottleneck": setting["bottleneck"]},
        steps=setting["steps"],
        adversary=adversary,
        batch=24,
    )
    with tempfile.TemporaryDirectory() as folder:
        done = train_guard(
            config,
            train,
            backend.source,
            backend.special,
            Path(folder),
            adversary_factory("decoder"),
        )
    figures = held_out_figures(done, held_out, backend)
    return {
        **setting,
        **figures,
        "asr_fresh": judge(done, backend, run.data),
        "seconds": round(done.seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/residual_search.json"))
    parser.add_argument("--runs", type=int, default=len(GRID), help="only the first so many")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    run = load_config(TrainRun, preset("train-residual"), args.sets)
    # validation records of their own: neither training nor any evaluation uses these seeds
    data = replace(run.data, seed=run.data.seed + 900, test_records=200)
    backend = load_backend(run.model)
    train = backend.encoder.encode(hops_for(run.data)[0])
    held_out = with_policy(backend.encoder.encode(hops_for(data)[1]), CATEGORIES)
    rows = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for setting in GRID[: args.runs]:
        if any(all(r.get(k) == v for k, v in setting.items()) for r in rows):
            continue
        rows.append(one(setting, replace(run, data=data), backend, train, held_out))
        print(json.dumps(rows[-1]), flush=True)
        usable = [r for r in rows if r["utility"] >= 0.95 * r["utility_vanilla"]]
        best = min(usable, key=lambda r: max(r["asr_fresh"].values()), default=None)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"chosen": best, "runs": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
