"""Trains the nano agent from scratch and checks it on held-out records.

    python scripts/train_nano.py --out runs/nano                # the shipped agent's configuration
    python scripts/train_nano.py --config my.yaml --set steps=100 --out runs/try
    python scripts/train_nano.py --check agents/nano/model      # accuracy of an existing folder

Killed runs resume. Writes an ordinary model folder, ``train_log.jsonl`` and ``accuracy.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lcguard.agents.nano.check import accuracy
from lcguard.agents.nano.training import NanoConfig, train
from lcguard.commands.script import run_script
from lcguard.config import load_config

CONFIG = Path(__file__).parent / "configs" / "nano.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--check", type=Path, help="only measure this model folder")
    parser.add_argument("--records", type=int, default=1000, help="held-out records to measure on")
    args = parser.parse_args(argv)
    folder = args.check
    if folder is None:
        folder = args.out
        train(load_config(NanoConfig, args.config, args.sets), folder)
    found = accuracy(str(folder), args.records)
    print(json.dumps(found, indent=1))
    if args.check is None:
        (folder / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
