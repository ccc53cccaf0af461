"""Tokens a second of what finds private data in text: ``lcguard.detect``, Presidio's patterns,
Presidio over spaCy.

python scripts/bench_detect.py --records 40 --out benchmarks/results/detect_speed.json

All read the same generated records, in turns that change in every round, one text at a time as a
proxy does. The floor of the first is SmolLM2's own prefill of the same tokens, timed in the same
round; its surplus is the detector. Tokens are SmolLM2's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from lcguard.agents.scenarios.encode import Encoder
from lcguard.categories import CATEGORIES
from lcguard.commands.presidio import PresidioText
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.commands.text_detector import TextDetector
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.plan import DataConfig
from lcguard.server.detection.detector import Detector


def readers(text: TextDetector) -> dict[str, Callable[[str], object]]:
    """What reads one text, by name."""
    patterns, spacy = Detector(), PresidioText()
    return {
        "prefill alone (floor)": lambda note: text.source.prefill([text.encoder.context(note)]),
        "lcguard.detect": text.find,
        "presidio, patterns": lambda note: patterns.find(note, CATEGORIES),
        "presidio + spaCy": spacy.find,
    }


def measure(
    reads: dict[str, Callable[[str], object]], texts: Sequence[str], encoder: Encoder, rounds: int
) -> dict[str, Any]:
    """Median tokens a second over rounds, after one to warm up."""
    n_tokens = sum(len(encoder.context(text)) for text in texts)
    rates: dict[str, list[float]] = {name: [] for name in reads}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(reads), len(reads)):
            started = time.perf_counter()
            for text in texts:
                reads[name](text)
            if turn:
                rates[name].append(n_tokens / (time.perf_counter() - started))
    return {
        "tokens": n_tokens,
        "tokens_per_s": {name: round(statistics.median(r), 1) for name, r in rates.items()},
        "raw": rates,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, records=40, rounds=3, seed=0)
    args = parser.parse_args(argv)
    hops = hops_for(DataConfig(seed=args.seed, train_records=1, test_records=args.records))[1]
    texts = list(dict.fromkeys(hop.record.text for hop in hops))
    detector = TextDetector()
    found = {
        "texts": len(texts),
        "rounds": args.rounds,
        **measure(readers(detector), texts, detector.encoder, args.rounds),
    }
    for name, rate in found["tokens_per_s"].items():
        print(f"{name:24} {rate:10.1f} tokens/s")
    command = f"python scripts/bench_detect.py --records {args.records}"
    write_report(args, "Speed of detectors of text", command, found)
    return 0


if __name__ == "__main__":
    run_script(main)
