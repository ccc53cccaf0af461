"""Measures what guarded hops leak: the same as ``lcguard eval run``.

python scripts/evaluate_asr.py main --out runs/main                # the three-seed benchmark
python scripts/evaluate_asr.py agentleak --data PATH --out runs/agentleak
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lcguard.commands.script import run_script
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.presets import load_plan
from lcguard.evaluation.run import evaluate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, or a preset: demo, main, agentleak")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    command = "python scripts/evaluate_asr.py " + " ".join([args.config, *args.sets])
    plan = load_plan(EvalConfig, args.config, args.sets, args.data)
    evaluate(plan, args.out, command, print, device=args.device)
    return 0


if __name__ == "__main__":
    run_script(main)
