"""Trains the detector of guard ``twin`` for a model, and measures what one finds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops, split_hops
from lcguard.agents.scenarios.types import Hop
from lcguard.atomic_file import replace_file
from lcguard.categories import CATEGORIES
from lcguard.commands.detector_rounds import RoundsConfig, Stage, play
from lcguard.commands.presidio import PresidioText
from lcguard.commands.text_detector import TextDetector
from lcguard.config import dump_config
from lcguard.evaluation.detection import BATCH, hidden_tokens, measure
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.quick import fewer, fewer_records
from lcguard.guards import FrozenGuard, KVShape
from lcguard.guards.frozen import weights_digest
from lcguard.guards.twin import TwinGuard
from lcguard.records import TokenRecord
from lcguard.source import ModelSource
from lcguard.training.fit_detector import (
    DetectorConfig,
    ReadRecords,
    choose_peak,
    choose_thresholds,
    hiding_costs,
    read_records,
)
from lcguard.training.kept_tensors import KeptTensors

Say = Callable[[str], None]
_QUICK = {"verdict": "not measured", "reason": "a quick run"}
"""What a card says of it, so that it is served by name alone."""


@dataclass(frozen=True)
class DetectorRun:
    """A detector's training, one YAML file."""

    model: str = "smollm2"
    first_layers: int = 0
    """Of the model that are run, for a detector that only reads text (``lcguard.detect``); 0: all,
    as a guard of the model's KV needs."""
    sources: tuple[DataConfig, ...] = field(default_factory=lambda: (DataConfig(),))
    """``train_records`` of each are trained on but for the validation share, ``test_records`` are
    what the card's recall is measured on; they share no scenario."""
    validation_share: float = 0.12
    """Of the training scenarios: thresholds are chosen on them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of guard ``twin``."""
    start: str = ""
    """A guard to go on from, such as ``smollm2:twin``; empty: a fresh one."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    """Against attackers."""
    against: Literal["presidio"] | None = None
    """Measured on the held-out records too."""
    quick: bool = False
    """As ``--quick`` makes it: nothing speaks for the guard that comes of it."""


def quickened(run: DetectorRun) -> DetectorRun:
    """A quarter of the records of each source and of the steps, marked as a quick run."""
    rounds = replace(run.rounds, steps=fewer(run.rounds.steps), records=fewer(run.rounds.records))
    return replace(
        run,
        quick=True,
        sources=tuple(fewer_records(data) for data in run.sources),
        detector=replace(run.detector, steps=fewer(run.detector.steps)),
        rounds=rounds if run.rounds.count else run.rounds,
    )


def found_by(
    guard: FrozenGuard, source: ModelSource, records: Sequence[TokenRecord]
) -> list[Tensor]:
    """Which tokens a guard that finds values itself hides: ``[T]`` bool for each record.

    Raises ``ValueError`` for a guard that is told them.
    """
    out: dict[int, Tensor] = {}
    order = sorted(range(len(records)), key=lambda i: len(records[i].ids))
    for first in range(0, len(order), BATCH):
        at = order[first : first + BATCH]
        rows = [records[i] for i in at]
        found = hidden_tokens(guard, source.prefill([r.ids for r in rows], len(rows)), rows)
        if found is None:
            raise ValueError(f"guard {guard.name!r} finds nothing itself: give one with a detector")
        out |= dict(zip(at, found, strict=True))
    return [out[i] for i in range(len(records))]


def train_detector(
    run: DetectorRun, out: Path, command: str, say: Say, features: Path | None = None
) -> dict[str, Any]:
    """Trains, chooses thresholds, measures held-out recall and writes ``out/guard``.

    ``features``: where what was read and fitted is kept, ``out/features`` if not given.
    Raises ``ValueError`` in one line for data, model or options that do not fit.
    """
    if not 0 < run.validation_share < 1:
        raise ValueError(f"validation_share = {run.validation_share}: use a share between 0 and 1")
    if run.rounds.count:
        run.rounds.check_attacks()
    backend = load_backend(run.model, reader=False, first_layers=run.first_layers)
    module = _start(run, backend)
    parts = [_Parts.of(data, run.validation_share, backend) for data in run.sources]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(run))
    counts = (sum(len(p.train) for p in parts), sum(len(p.validation) for p in parts))
    held = sum(len(p.held) for p in parts)
    say("{} training, {} validation and {} held-out records".format(*counts, held))
    read_by = [backend.digest, run.first_layers] if run.first_layers else backend.digest
    kept = KeptTensors(features or out / "features", read_by)
    texts = {r.ids for p in parts for r in p.train + p.validation}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("read", total=len(texts))

        def read(records: list[TokenRecord]) -> ReadRecords:
            step = partial(bar.advance, task)
            return read_records(module, records, backend.source, progress=step, kept=kept)

        train = [read(p.train) for p in parts]
        validation = [read(p.validation) for p in parts]
        steps = run.detector.steps + run.rounds.count * run.rounds.steps
        task = bar.add_task("fit", total=steps)
        stage = Stage(
            backend,
            module,
            run.detector,
            kept,
            partial(_chosen, run, module, validation),
            partial(_cost, run, validation),
            by_reply=EvalConfig(model=run.model).by_reply,
            say=say,
            advance=partial(bar.advance, task),
        )
        began = weights_digest(module) if run.start else ""
        done, rounds = play(run.rounds, stage, train, began)
    guard = FrozenGuard(done)
    played = {"rounds": rounds} if rounds else {}
    figures: dict[str, Any] = {}
    for data, part in zip(run.sources, parts, strict=True):
        figures[_label(data)] = measure(part.held, found_by(guard, backend.source, part.held))
        if run.against:
            marks = PresidioText().marks(part.hops, backend.encoder)
            figures[_label(data)][run.against] = measure(part.held, marks)
    guard = guard.with_card(
        model_id=run.model,
        model_digest=backend.digest,
        evaluation={"held_out": figures, **(_QUICK if run.quick else {})},
        training={"command": command, "config": json.loads(json.dumps(asdict(run))), **played},
    )
    guard.save_pretrained(out / "guard")
    summary = {
        "held_out": figures,
        **played,
        "run": run_manifest(command, [run.detector.seed], run),
    }
    replace_file(out / "summary.json", (json.dumps(summary, indent=1, default=str) + "\n").encode())
    return summary


def _start(run: DetectorRun, backend: HFBackend) -> TwinGuard:
    """What is trained: a fresh guard, or another's weights, statistics and options."""
    options = dict(run.options)
    if not run.start:
        torch.manual_seed(run.detector.seed)  # a run that was ended starts from the same
        return TwinGuard.build(KVShape(*backend.source.shape), len(CATEGORIES), options)
    other = load_guard(GuardSpec("start", path=run.start), backend).module
    if not isinstance(other, TwinGuard):
        raise ValueError(f"start: {run.start} is guard {other.name!r}, not 'twin': leave it out")
    module = TwinGuard.build(other.shape, len(CATEGORIES), other.options() | options)
    module.load_state_dict(other.state_dict())
    return module


def _thresholds(
    run: DetectorRun, module: TwinGuard, validation: Sequence[ReadRecords]
) -> tuple[float, ...]:
    """Chosen on the validation records; going on from a guard, which may have been fitted on them
    and is then surer of their values than of others, none is raised above that guard's."""
    chosen = choose_thresholds(module, validation, run.detector)
    if not run.start:
        return chosen
    return tuple(map(min, chosen, module.thresholds.tolist()))


def _chosen(run: DetectorRun, module: TwinGuard, validation: Sequence[ReadRecords]) -> TwinGuard:
    """The guard that a fitted detector makes: its thresholds and, where none is given, its peak."""
    options = module.options() | {"thresholds": _thresholds(run, module, validation)}
    done = TwinGuard.build(module.shape, len(CATEGORIES), options)
    done.load_state_dict(module.state_dict())
    if "peak" not in run.options:
        peak = choose_peak(done, validation, run.detector)
        done.config = replace(done.config, peak=peak)
    return done


def _cost(run: DetectorRun, validation: Sequence[ReadRecords], guard: TwinGuard) -> float:
    """Of what it would hide of validation records, the mean of the sources."""
    peak = guard.config.peak
    costs = hiding_costs(guard, validation, [peak], run.detector)
    return costs[peak] / len(validation)


def _label(data: DataConfig) -> str:
    """What a card calls a source."""
    return data.source if data.forms == DataConfig.forms else f"{data.source}, other forms"


@dataclass(frozen=True)
class _Parts:
    """Records of a source; no scenario is in two of the parts."""

    train: list[TokenRecord]
    validation: list[TokenRecord]
    held: list[TokenRecord]
    hops: list[Hop]
    """Of ``held``."""

    @classmethod
    def of(cls, data: DataConfig, share: float, backend: HFBackend) -> _Parts:
        train, held = hops_for(data)
        if not train or not held:
            raise ValueError(f"{data.source}: {len(train)} training, {len(held)} held-out records")
        fitted, chosen = split_hops(train, 1 - share, data.seed)
        encode = backend.encoder.encode
        return cls(encode(fitted), encode(chosen), encode(held), held)


def measure_detector(
    data: DataConfig, model: str, guard: str, against: str | None, command: str
) -> dict[str, Any]:
    """Figures of a guard's detector on a source's records, with Presidio's beside them; without
    ``model``, of the detector of text."""
    hops = all_hops(data)
    if model:
        backend = load_backend(model, reader=False)
        loaded = load_guard(GuardSpec("detector", path=guard), backend)
        encoder, records = backend.encoder, backend.encoder.encode(hops)
        marks = found_by(loaded, backend.source, records)
    else:
        text = TextDetector(guard=guard)
        encoder, records = text.encoder, text.encoder.encode(hops)
        marks = text.marks(hops)
    out: dict[str, Any] = {
        "source": data.source,
        "model": model or None,
        "guard": guard,
        "records": len(records),
        **measure(records, marks),
    }
    if against:
        out[against] = measure(records, PresidioText().marks(hops, encoder))
    return out | {"run": run_manifest(command, [data.seed], data)}


def all_hops(data: DataConfig) -> list[Hop]:
    """``test_records`` of a source, all of a file's where that is 0."""
    if data.source == "generator":
        return hops_for(replace(data, train_records=1))[1]
    hops = load_hops(data.source, path=Path(data.path) if data.path else None, seed=data.seed)
    if data.test_records and data.test_records < len(hops):
        chosen = random.Random(f"detect/{data.seed}").sample(range(len(hops)), data.test_records)
        hops = [hops[i] for i in sorted(chosen)]
    return hops
