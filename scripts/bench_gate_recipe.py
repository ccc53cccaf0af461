"""The recipe for the gate at three seeds, and what each option adds to a shorter run of it.

    python scripts/bench_gate_recipe.py --work runs/recipe --out benchmarks/results/gate_recipe.json

Every row is a training of preset ``gate-recipe`` with other settings, or the shipped gate. Fresh
attackers are then fitted on its segments. The certificate is that of the training, on held-out
records of its data's seed; everything else is measured on records of another seed, which chose
nothing. A row is written when it is done, and both trainings and fits go on where they were
stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.commands.train import TrainRun, certificate_of, run_training
from lcguard.config import load_config
from lcguard.evaluation.hop_segments import HopSegments
from lcguard.evaluation.load import hops_for, known_values, load_guard
from lcguard.evaluation.outcomes import Journal
from lcguard.evaluation.plan import EvalConfig, GuardSpec, PolicySpec
from lcguard.evaluation.presets import load_plan, preset
from lcguard.evaluation.runner import Runner, Setup
from lcguard.evaluation.schedule import Challenge, HopRun
from lcguard.evaluation.statistics import asr_by_category, best_attack, mean_over_categories
from lcguard.evaluation.summary import rate, utility_figures
from lcguard.guards.frozen import FrozenGuard
from lcguard.training.dataset import with_policy

T = TypeVar("T")
SHIPPED = "nano:gate"
MASKED = ("train.teacher=twin", "train.category_weight=0.1")
SHORT = ("train.steps=400", "train.label_steps=70")
ADVERSARY = "{count: 1, weight: 0.3, attack: decoder, objective: least_squares}"
ROWS: dict[str, Sequence[str] | None] = {
    "shipped": None,
    **{f"recipe, seed {seed}": (f"train.seed={seed}",) for seed in range(3)},
    **{
        f"masked twin, category adversary, 3,000 steps, seed {seed}": (
            "train.steps=3000",
            *MASKED,
            f"train.seed={seed}",
        )
        for seed in range(2)
    },
    "a sixth of the steps": SHORT,
    "+ noise along secrets' traces": (*SHORT, "train.trace_noise=1.0"),
    "+ penalty along secrets' traces": (*SHORT, "train.trace_weight=0.3"),
    "+ uncertain teacher": (*SHORT, "train.uncertain_nats=0.5"),
    "+ rare categories": (*SHORT, "train.rare_strength=0.5"),
    "+ least-squares attacker, rollback": (
        *SHORT,
        f"train.adversary={ADVERSARY}",
        "train.rollback_every=50",
    ),
    "+ masked twin, category adversary": (*SHORT, *MASKED),
}
"""Name -> what is set over the preset; None trains nothing."""
EVALUATION = (
    "{seed: 2000, train_records: 900, test_records: 240}",
    ("probe", "decoder-warm"),
)
"""Records, and the attackers of preset ``main``: the one that reads an entry, and the one that
recovers most of the gate there."""
ALLOWED = (
    PolicySpec("government_id", ("government_id",)),
    PolicySpec("half", ("person", "health", "finance")),
)


def one_by_one(jobs: Sequence[Callable[[], T]], device: str = "cpu") -> Iterator[tuple[int, T]]:
    """An executor that leaves the other cores alone."""
    yield from enumerate(job() for job in jobs)


def say(text: str) -> None:
    """At once, also into a file."""
    print(text, flush=True)


def trained(name: str, sets: Sequence[str], work: Path) -> tuple[str, dict[str, Any]]:
    """The guard's folder and the training's summary; only what is not done yet is done."""
    out = work / name.replace("+ ", "plus ").replace(" ", "-").replace(",", "").replace("'", "")
    run = load_plan(TrainRun, "gate-recipe", sets, None, prefix="train-")
    if not (out / "summary.json").exists():
        command = " ".join(["lcguard train gate-recipe", *(f"--set '{s}'" for s in sets)])
        run_training(run, out, command, say)
    return str(out / "guard"), json.loads((out / "summary.json").read_text(encoding="utf-8"))


def shipped(backend: HFBackend, work: Path) -> dict[str, Any]:
    """Its certificate as a training of the recipe takes it; taken once."""
    kept = work / "shipped.json"
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    run = load_plan(TrainRun, "gate-recipe", (), None, prefix="train-")
    train, test = (backend.encoder.encode(hops) for hops in hops_for(run.data))
    found = certificate_of(
        run.train,
        load_guard(GuardSpec("gate", path=SHIPPED), backend),
        with_policy(test[: run.train.certificate_pairs], CATEGORIES),
        backend,
        known_values(run.data, backend, train),
    )
    assert found is not None
    summary = {"certificate": found.to_dict(), "seconds": None}
    kept.write_text(json.dumps(summary), encoding="utf-8")
    return summary


def evaluation() -> EvalConfig:
    """Preset ``main`` with fewer attackers, one seed and records of its own."""
    data, names = EVALUATION
    plan = load_config(EvalConfig, preset("main"), [f"data={data}", "seeds=[0]"])
    chosen = tuple(a for a in plan.attacks if a.name in names)
    return replace(plan, attacks=chosen, guards=(), policies=(), derived=None, injection=False)


def measured(spec: GuardSpec, hops: HopSegments, runner: Runner) -> Mapping[str, Any]:
    """What fresh attackers recover, and what the receiver still answers."""
    plan = evaluation()
    run = HopRun(runner, replace(plan, guards=(spec,)), hops)
    attempts = run.attacked(Challenge(spec, None, plan.attacks))
    best, floor = best_attack(attempts), mean_over_categories(run.floor()).value
    by_category = asr_by_category([a for a in attempts if a.attack == best.name])
    worst = max(by_category, key=lambda name: by_category[name]["asr"] or 0.0)
    allowed = [
        {
            "accuracy": rate(run.utility(spec, policy), "allowed"),
            "vanilla": rate(run.utility(None, policy), "allowed"),
        }
        for policy in ALLOWED
    ]
    return {
        **utility_figures(run.utility(spec), run.utility(None)),
        "asr_fresh": best.value,
        "asr_fresh_ci": best.ci,
        "asr_fresh_best": best.name,
        "asr_fresh_by_attack": {name: e.value for name, e in best.by_attack.items()},
        "floor": floor,
        "worst_category": worst,
        "asr_worst_category": by_category[worst]["asr"],
        "allowed": dict(zip((p.name for p in ALLOWED), allowed, strict=True)),
    }


def row(name: str, found: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    certificate = found["certificate"]
    secrets = certificate["secrets"]["by_category"]
    worst = max(secrets, key=lambda c: secrets[c]["ceiling"])
    return {
        "name": name,
        "sets": list(ROWS[name] or ()),
        **figures,
        "mean_nats": certificate["mean_nats"],
        "ceiling": certificate["asr_ceiling"],
        "blind_guess": certificate["blind_guess"],
        "ceiling_worst": {"category": worst, "ceiling": secrets[worst]["ceiling"]},
        "seconds": found["seconds"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, work="runs/recipe", rows=(len(ROWS), "only the first so many"))
    args = parser.parse_args(argv)
    work, plan, backend = Path(args.work), evaluation(), load_backend("nano")
    sides = [backend.encoder.encode(hops) for hops in hops_for(plan.data)]
    guards: dict[str, FrozenGuard] = {}
    hops = HopSegments(backend, guards, (sides[0], sides[1]), plan.data)
    rows: list[dict[str, Any]] = []
    with Journal(work / "journal.jsonl") as journal:
        runner = Runner(Setup(plan, backend, guards, say, one_by_one), journal)
        for name in list(ROWS)[: args.rows]:
            sets = ROWS[name]
            path, found = (
                (SHIPPED, shipped(backend, work)) if sets is None else trained(name, sets, work)
            )
            spec = GuardSpec(name, path=path)
            guards[name] = load_guard(spec, backend)
            rows.append(row(name, found, measured(spec, hops, runner)))
            say(json.dumps(rows[-1]))
            command = "python scripts/bench_gate_recipe.py"
            write_report(args, "The recipe for the gate", command, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_script(main)
