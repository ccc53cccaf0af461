"""What rounds against attackers buy a detector of guard ``twin``, option by option.

    python scripts/bench_attacked_rounds.py --work runs/attacked-rounds \
        --out benchmarks/results/attacked_rounds.json

Every row is a training of ``scripts/configs/attacked_rounds.yaml``, all with as many steps. The
model reads each record once, for all rows. Thresholds are chosen on validation records; recall, and
what a fresh ``inversion`` recovers from the twins, are of held-out ones. A row is written when it
is done, and a run that was ended goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import load_backend
from lcguard.atomic_file import replace_file
from lcguard.commands.detector import DetectorRun, quickened, train_detector
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.config import dump_config, load_config
from lcguard.evaluation.attacked_twins import NOT_ASKED, RECOVERED, Attackers
from lcguard.evaluation.detection import recall_lower
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.plan import AttackSpec, EvalConfig, GuardSpec
from lcguard.guards.twin import TwinGuard
from lcguard.tokens import TokenRecord
from lcguard.training.fit_detector import ReadRecords, read_records
from lcguard.training.kept_tensors import KeptTensors

CONFIG = Path(__file__).parent / "configs" / "attacked_rounds.yaml"
PLAYED = ("detector.steps=100", "rounds.count=2", "rounds.steps=100")
BUDGETS = "rounds.budget_strength=0.5"
UNCERTAIN = "rounds.uncertain_nats=1.0"
ROLLBACK = "rounds.rollback_slack=0.0"
ROWS: dict[str, Sequence[str]] = {
    "one fit on all records": (),
    "rounds, no hard examples": (*PLAYED, "rounds.hard_weight=1.0"),
    "rounds, hard examples": PLAYED,
    "+ budgets per category": (*PLAYED, BUDGETS),
    "+ uncertain teacher": (*PLAYED, UNCERTAIN),
    "+ rollback": (*PLAYED, ROLLBACK),
    "+ all three": (*PLAYED, BUDGETS, UNCERTAIN, ROLLBACK),
}
"""Name -> what is set over the configuration."""
ATTACK = AttackSpec("inversion", "inversion")
KNOWN = 16
"""Training records of each source that the attacker knows: channels weigh as they vary in them."""


def run_of(name: str, seed: int, args: Any) -> DetectorRun:
    sets = [*ROWS[name], f"model={args.model}", f"detector.seed={seed}"]
    run = load_config(DetectorRun, CONFIG, sets)
    sources = tuple(replace(data, path=args.data) for data in run.sources)
    run = replace(run, sources=sources)
    return quickened(quickened(run)) if args.quick else run


def row(name: str, seed: int, args: Any) -> dict[str, Any]:
    """Trained and measured, or as it was when it was.

    Raises ``ValueError`` where ``args.work`` has the row with other settings.
    """
    work, run = Path(args.work), run_of(name, seed, args)
    kept = work / f"{name.replace('+ ', 'plus ').replace(',', '').replace(' ', '-')}-{seed}"
    if (done := kept / "row.json").exists():
        if (kept / "config.yaml").read_text() != dump_config(run):
            raise ValueError(f"{kept} was made with other settings: give another --work")
        return dict(json.loads(done.read_text(encoding="utf-8")))
    started = time.perf_counter()
    command = f"scripts/bench_attacked_rounds.py, {name!r}"
    summary = train_detector(run, kept, command, say, work / "features")
    seconds = time.perf_counter() - started
    backend = load_backend(run.model, reader=False)
    guard = load_guard(GuardSpec(name, path=str(kept / "guard")), backend).module
    assert isinstance(guard, TwinGuard)
    attackers = Attackers(backend, (ATTACK,), seed, EvalConfig(model=run.model).by_reply)
    kept_features = KeptTensors(work / "features", backend.digest)
    read = partial(read_records, guard, source=backend.source, kept=kept_features)
    counts = attacked(guard, attackers, read, run)
    found = {
        label: {**figures, **own}
        for (label, figures), own in zip(summary["held_out"].items(), counts, strict=True)
    }
    made = {
        "name": name,
        "seed": seed,
        "sets": list(ROWS[name]),
        **together(list(found.values())),
        "sources": found,
        "rounds": summary.get("rounds", []),
        "seconds": seconds,
    }
    replace_file(done, json.dumps(made).encode())
    return made


def attacked(
    guard: TwinGuard,
    attackers: Attackers,
    read: Callable[[list[TokenRecord]], ReadRecords],
    run: DetectorRun,
) -> list[dict[str, int]]:
    """What is recovered from twins of each source's held-out records."""
    sides = [hops_for(data) for data in run.sources]
    encode = attackers.backend.encoder.encode
    known = read([r for train, _ in sides for r in encode(train[:KNOWN])])
    held = [encode(hops) for _, hops in sides]
    codes = iter(attackers.recovered(guard, known, read([r for rows in held for r in rows])))
    out = []
    for rows in held:
        own = [code for _ in rows for code in next(codes)]
        asked, won = sum(c != NOT_ASKED for c in own), sum(c == RECOVERED for c in own)
        out.append({"asked": asked, "recovered": won})
    return out


def together(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all sources."""
    sums = {k: sum(s[k] for s in sources) for k in ("found", "total", "asked", "recovered")}
    spans = sum(s["task_spans"] for s in sources)
    touched = sum(s["task_spans"] * (s["task_touched"] or 0.0) for s in sources)
    return {
        **sums,
        "recall": sums["found"] / sums["total"] if sums["total"] else None,
        "recall_lower": recall_lower(sums["found"], sums["total"]),
        "task_touched": touched / spans if spans else None,
        "asr": sums["recovered"] / sums["asked"] if sums["asked"] else None,
    }


def say(text: str) -> None:
    """At once, also into a file."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        work="runs/attacked-rounds",
        data=("", "folder of the benchmarks; LCGUARD_DATA if not given"),
        model="smollm2",
        seeds=(1, "trainings of each row"),
        rows=(len(ROWS), "only the first so many"),
    )
    parser.add_argument("--quick", action="store_true", help="a sixteenth of all, to see it run")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for name in list(ROWS)[: args.rows]:
            rows.append(row(name, seed, args))
            say(_line(rows[-1]))
            command = "python scripts/bench_attacked_rounds.py"
            found = {"quick": args.quick, "rows": rows}
            write_report(args, "Rounds against attackers", command, found)
    return 0


def _line(made: Mapping[str, Any]) -> str:
    return (
        f"{made['name']}, seed {made['seed']}: {made['found']} of {made['total']} found, "
        f"{made['recovered']} of {made['asked']} recovered, task spans touched "
        f"{made['task_touched']:.3f}, {made['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run_script(main)
