"""Trains the reader of SmolLM2: adapters with which it answers by the value alone.

    LCGUARD_DATA=PATH python scripts/train_reader.py --out runs/reader
    LCGUARD_DATA=PATH python scripts/train_reader.py --measure runs/reader --results reader.json

Contexts are read by the plain model, as they stand or with what their policy forbids replaced by
neutral tokens; what is hidden, or not there, is to be answered with "not stated". Then counts right
answers on raw KV of held-out records, with the adapters and without, into --results; --measure
does that for adapters that are there. agents/smollm2/reader was trained in three goes: the second
with --set reader.start=FIRST --set reader.steps=160 --set reader.lr=0.0006 --set reader.seed=1, the
third with start=SECOND, steps=240, lr=0.0008, seed=2 and --set 'weights=[6,3,1,1]'. It is the
--average SECOND THIRD: on validation records better than either.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.phrasing import ABSENT
from lcguard.commands.script import run_script
from lcguard.config import load_config
from lcguard.evaluation.answers import VALUE_ONLY, said_right
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig
from lcguard.protocols import KVBatch
from lcguard.records import PackedQuestions, TokenRecord, pack_questions
from lcguard.source import ModelSource
from lcguard.training.fit_reader import ReaderConfig, fit_reader, load_reader
from lcguard.training.twins import neutral_twin

CONFIG = Path(__file__).parent.parent / "agents" / "smollm2" / "reader.yaml"
ADAPTERS = "adapter_model.safetensors"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ReaderRun:
    model: str = "smollm2"
    sources: tuple[DataConfig, ...] = ()
    weights: tuple[float, ...] = ()
    """How often a step is of each source, in the sources' order."""
    records: int = 6
    """A step."""
    questions: int = 6
    """A record, at most."""
    hidden: float = 0.3
    """Share of records whose forbidden values are hidden."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)


class Lessons:
    """Draws each step's records and questions; the same step always gives the same."""

    def __init__(self, run: ReaderRun, backend: HFBackend, sides: Sequence[Sequence[Any]]) -> None:
        plain, terse = backend.encoder, backend.encoder.asking(VALUE_ONLY)
        self._sets = [[e.encode(hops) for e in (plain, terse)] for hops in sides]
        self._run, self._backend = run, backend
        self._absent = plain.answer(ABSENT)

    def __call__(self, step: int) -> tuple[KVBatch, PackedQuestions]:
        rng = random.Random(f"reader/{self._run.reader.seed}/{step}")
        (chosen,) = rng.choices(self._sets, self._run.weights)  # one source: little padding
        records = [
            self._lesson(rng, rng.choice(rng.choice(chosen))) for _ in range(self._run.records)
        ]
        source = self._backend.source
        return source.prefill([r.ids for r in records]), pack_questions(
            records, pad_id=source.pad_id
        )

    def _lesson(self, rng: random.Random, record: TokenRecord) -> TokenRecord:
        asked = rng.sample(record.questions, min(len(record.questions), self._run.questions))
        ids = record.ids
        if rng.random() < self._run.hidden:
            ids = neutral_twin(record, record.forbid, self._backend.special.neutral_id)
            asked = [
                replace(q, answer=self._absent) if q.category in record.forbid else q for q in asked
            ]
        return replace(record, ids=ids, questions=tuple(asked))


def answered(backend: HFBackend, source: ModelSource, hops: Sequence[Any]) -> dict[str, Any]:
    """Right answers to direct questions on raw KV."""
    records = backend.encoder.asking(VALUE_ONLY).encode(hops)
    kv = source.prefill([r.ids for r in records])
    right = said_right(source, backend.decode, records, kv, lambda r, q: q.kind == "direct")
    found = [ok for row in right for ok in row]
    return {"right": sum(found), "asked": len(found), "share": sum(found) / max(1, len(found))}


def save(model: Any, folder: Path) -> None:
    """Adapters in half precision, without this machine's paths."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    config = model.peft_config["default"]
    config.base_model_name_or_path = HUB_NAME
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template


def average(folders: Sequence[Path], out: Path) -> None:
    """Adapters whose factors are the means of others', of one size and one training. The product of
    two means is only nearly the mean of the products."""
    read = [load_file(folder / ADAPTERS) for folder in folders]
    if any(
        {k: v.shape for k, v in r.items()} != {k: v.shape for k, v in read[0].items()} for r in read
    ):
        raise ValueError(f"{' and '.join(map(str, folders))} are adapters of different sizes")
    mean = {k: torch.stack([r[k].float() for r in read]).mean(0).half() for k in read[0]}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folders[0] / "adapter_config.json", out / "adapter_config.json")
    save_file(mean, out / ADAPTERS, metadata={"format": "pt"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--out", type=Path, help="folder for the adapters")
    folder.add_argument("--measure", type=Path, help="folder of adapters, which are not trained")
    parser.add_argument("--average", type=Path, nargs=2, help="of two such folders, into --out")
    parser.add_argument("--results", type=Path, help="JSON file for the counts")
    parser.add_argument("--asked-records", type=int, default=60, help="held out, of each source")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="override a key")
    args = parser.parse_args(argv)
    if args.average and not args.out:
        parser.error("--average needs --out: the folder for the mean of the two")
    run = load_config(ReaderRun, CONFIG, args.sets)
    backend = load_backend(run.model, reader=False)
    train, held = zip(*(hops_for(data) for data in run.sources), strict=True)

    def say(step: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step}: {loss:.3f}", flush=True)

    if args.out and args.average:
        average(args.average, args.out)
    elif args.out:
        lessons = Lessons(run, backend, train)
        save(fit_reader(backend.source, lessons, run.reader, say), args.out)
    plain = backend.source
    adapters = load_reader(plain.model, args.measure or args.out)
    reader = ModelSource(plain.model, plain.pad_id, reader=adapters)
    figures: dict[str, Any] = {}
    for data, hops in zip(run.sources, held, strict=True):
        some = hops[: args.asked_records]
        sides = {"without": plain, "with": reader}
        figures[data.source] = {name: answered(backend, s, some) for name, s in sides.items()}
        print(data.source, json.dumps(figures[data.source]), flush=True)
    if args.results:
        whole = {
            "answers": figures,
            "run": run_manifest(shlex.join(["python", *sys.argv]), [run.reader.seed], run),
        }
        args.results.write_text(json.dumps(whole, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
