"""Measures what examples of a category teach: project names in prose that this script writes.

    python scripts/measure_own_category.py --out benchmarks/results/own_category.json

No name, person, place, company or tool of the tests is in the examples. ``same sentences``: what is
said around the names is put together from the examples' parts; ``other sentences``: from others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcguard.agents.scenarios.load import load_hops
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.category_head import CategoryHead
from lcguard.commands.category_detector import train_category
from lcguard.commands.script import run_script
from lcguard.commands.text_detector import Span, shared_text_detector
from lcguard.evaluation.detection import recall_lower
from lcguard.evaluation.manifest import run_manifest
from lcguard.training.fit_head import HeadConfig
from lcguard.value_search import Range

WORDS = tomllib.loads(Path(__file__).with_name("project_notes.toml").read_text())
NAME = "project_name"
Note = tuple[str, list[Range]]


class Writer:
    """Notes of one to four sentences."""

    def __init__(self, seed: int, part: str, unseen: bool) -> None:
        """``part``: whose sentences; ``unseen``: the second half of all names and other words."""
        self.rng, self.part, self.unseen = random.Random(seed), WORDS[part], unseen

    def half(self, words: Sequence[str]) -> str:
        middle = len(words) // 2
        return self.rng.choice(words[middle:] if self.unseen else words[:middle])

    def name(self) -> str:
        rng, names = self.rng, WORDS["names"]
        pair = f"{self.half(names['adjectives'])} {self.half(names['nouns'])}"
        name = pair if rng.random() < 0.5 else self.half(names["words"])
        name += f" {rng.randint(2, 9)}" if rng.random() < 0.12 else ""
        written = rng.random()
        return name.lower() if written < 0.1 else name.upper() if written < 0.18 else name

    def sentence(self, has: bool) -> str:
        rng, part = self.rng, self.part
        if not has:
            return str(rng.choice(part["others"]))
        kind = rng.random()
        if kind < 0.15:
            return str(rng.choice(part["sentences"]))
        if kind < 0.55:
            made = f"{{x}} {rng.choice(part['subject'])}"
            made = f"Project {made}" if rng.random() < 0.15 else made
        else:
            made = f"{rng.choice(part['before'])} {{x}}"
            made += f" {rng.choice(part['after'])}" if rng.random() < 0.6 else ""
        if made[0] != "{" and rng.random() < 0.8:
            made = made[0].upper() + made[1:]
        return made + rng.choice([".", ".", ".", "", ";", "?"])

    def note(self, has: bool) -> Note:
        n, name, text = self.rng.randint(1, 4), self.name(), ""
        first, spans = self.rng.randrange(n), list[Range]()
        for i in range(n):
            said = self.sentence(has and (i == first or self.rng.random() < 0.15))
            for what, words in WORDS["fills"].items():
                said = said.replace(f"{{{what}}}", self.half(words))
            before, found, after = said.partition("{x}")
            text += self.rng.choice([" ", " ", "\n"]) if text else ""
            if found:
                spans.append((len(text) + len(before), len(text) + len(before) + len(name)))
            text += before + (name if found else "") + after
        return text, spans

    def notes(self, n: int, share: float) -> list[Note]:
        return [self.note(self.rng.random() < share) for _ in range(n)]


def written(notes: Sequence[Note]) -> bytes:
    rows = [
        {"text": t, "spans": [{"start": a, "end": b, "category": NAME} for a, b in spans]}
        for t, spans in notes
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def measured(source: str, notes: Sequence[Note], head: CategoryHead) -> dict[str, Any]:
    """Values found whole, and what else was flagged."""
    find = shared_text_detector().find
    found = total = wrong = others = alarmed = 0
    for text, spans in notes:
        marked = [False] * len(text)
        hits: list[Span] = find(text, (), [head])
        for hit in hits:
            marked[hit.start : hit.end] = [True] * (hit.end - hit.start)
        total += len(spans)
        found += sum(all(marked[a:b]) for a, b in spans)
        inside = {i for a, b in spans for i in range(a, b)}
        others += len(text) - len(inside)
        wrong += sum(m for i, m in enumerate(marked) if i not in inside)
        alarmed += bool(hits) and not spans
    without = sum(not spans for _, spans in notes)
    return {
        "source": source,
        "texts": len(notes),
        "found": found,
        "total": total,
        "recall": found / total if total else None,
        "recall_lower": recall_lower(found, total) if total else None,
        "others_flagged": wrong / others,
        "without": without,
        "alarmed": alarmed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    config, rows = HeadConfig(), []
    tests = {
        "same sentences": Writer(1, "examples", True).notes(args.tests, 0.7),
        "other sentences": Writer(2, "test", True).notes(args.tests, 0.7),
        "generated records": [
            (hop.record.text, []) for hop in load_hops("generator", n=50, seed=77)[:50]
        ],
    }
    shared_text_detector()  # its loading is no training
    for n in args.examples:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "examples.jsonl")
            path.write_bytes(written(Writer(0, "examples", False).notes(n, 0.8)))
            began, cpu = time.monotonic(), time.process_time()
            made = train_category(NAME, path, Path(folder, "head"), config, print)
            took, worked = time.monotonic() - began, time.process_time() - cpu
            head = CategoryHead.read(made)
        rows.append(
            {
                "examples": n,
                "train_s": took,
                "cpu_s": worked,
                "held_out": head.card.held_out.model_dump(),
                "tests": [measured(source, notes, head) for source, notes in tests.items()],
            }
        )
    run = run_manifest("python scripts/measure_own_category.py", [config.seed], config)
    report = {"rows": rows, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "run": run}
    replace_file(args.out, (json.dumps(report, indent=1) + "\n").encode(), mode=PUBLIC)
    return 0


if __name__ == "__main__":
    run_script(main)
