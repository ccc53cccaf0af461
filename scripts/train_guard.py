"""Trains and certifies a guard: the same as ``lcguard train``, for use with accelerate.

python scripts/train_guard.py gate --out runs/gate
accelerate launch scripts/train_guard.py my.yaml --out runs/mine
python scripts/train_guard.py my.yaml --data my.jsonl --set data.source=jsonl --out runs/mine
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lcguard.commands.script import existing, run_script
from lcguard.commands.train import TrainRun, run_training
from lcguard.evaluation.presets import load_plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, or gate, regress, residual")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    run = load_plan(TrainRun, args.config, args.sets, existing(args.data), prefix="train-")
    command = "python scripts/train_guard.py " + " ".join([args.config, *args.sets])
    summary = run_training(run, args.out, command, print, args.device)
    if summary:
        print(json.dumps({k: v for k, v in summary.items() if k != "run"}, indent=1))
    return 0


if __name__ == "__main__":
    run_script(main)
