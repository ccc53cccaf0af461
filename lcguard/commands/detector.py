"""Trains the detector of guard ``twin`` for a model, and measures what one finds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops, split_hops
from lcguard.agents.scenarios.types import Hop
from lcguard.atomic_file import replace_file
from lcguard.categories import CATEGORIES
from lcguard.commands.presidio import PresidioText
from lcguard.config import dump_config
from lcguard.evaluation.detection import measure
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.guards import FrozenGuard, KVShape
from lcguard.guards.twin import TwinGuard
from lcguard.records import TokenRecord, masks
from lcguard.source import ModelSource
from lcguard.training.fit_detector import (
    DetectorConfig,
    choose_thresholds,
    fit_detector,
    read_records,
)
from lcguard.training.kept_tensors import KeptTensors

Say = Callable[[str], None]


@dataclass(frozen=True)
class DetectorRun:
    """A detector's training, one YAML file."""

    model: str = "smollm2"
    sources: tuple[DataConfig, ...] = field(default_factory=lambda: (DataConfig(),))
    """``train_records`` of each are trained on but for the validation share, ``test_records`` are
    what the card's recall is measured on; they share no scenario."""
    validation_share: float = 0.12
    """Of the training scenarios: thresholds are chosen on them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of guard ``twin``."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)


def found_by(
    guard: FrozenGuard, source: ModelSource, records: Sequence[TokenRecord]
) -> list[Tensor]:
    """Which tokens a guard that finds values itself hides: ``[T]`` bool for each record.

    Raises ``ValueError`` for a guard that is told them.
    """
    out: dict[int, Tensor] = {}
    order = sorted(range(len(records)), key=lambda i: len(records[i].ids))
    for first in range(0, len(order), 16):
        at = order[first : first + 16]
        rows = [records[i] for i in at]
        found = guard.marks(source.prefill([r.ids for r in rows], len(rows)), masks(rows))
        if found is None:
            raise ValueError(f"guard {guard.name!r} finds nothing itself: give one with a detector")
        for i, row, record in zip(at, found.cpu(), rows, strict=True):
            out[i] = row[: len(record.ids)] >= 0
    return [out[i] for i in range(len(records))]


def train_detector(run: DetectorRun, out: Path, command: str, say: Say) -> dict[str, Any]:
    """Trains, chooses thresholds, measures held-out recall and writes ``out/guard``.

    Raises ``ValueError`` in one line for data, model or options that do not fit.
    """
    if not 0 < run.validation_share < 1:
        raise ValueError(f"validation_share = {run.validation_share}: use a share between 0 and 1")
    backend = load_backend(run.model)
    module = TwinGuard.build(KVShape(*backend.source.shape), len(CATEGORIES), dict(run.options))
    parts = [_parts(data, run.validation_share, backend) for data in run.sources]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(run))
    counts = [sum(map(len, part)) for part in zip(*parts, strict=True)]
    say("{} training, {} validation and {} held-out records".format(*counts))
    kept = KeptTensors(out / "features", backend.digest)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("read", total=sum(len({r.ids for r in p[0] + p[1]}) for p in parts))
        train, validation = (
            [
                read_records(
                    module,
                    p[i],
                    backend.source,
                    progress=lambda n: bar.advance(task, n),
                    kept=kept,
                )
                for p in parts
            ]
            for i in (0, 1)
        )
        task = bar.add_task("fit", total=run.detector.steps)
        fit_detector(module, train, run.detector, lambda step, loss: bar.advance(task))
    options = module.options() | {"thresholds": choose_thresholds(module, validation, run.detector)}
    done = TwinGuard.build(module.shape, len(CATEGORIES), options)
    done.load_state_dict(module.state_dict())
    guard = FrozenGuard(done)
    figures = {
        _label(data): measure(held, found_by(guard, backend.source, held))
        for data, (_, _, held) in zip(run.sources, parts, strict=True)
    }
    guard = guard.with_card(
        model_id=run.model,
        model_digest=backend.digest,
        evaluation={"held_out": figures},
        training={"command": command, "config": json.loads(json.dumps(asdict(run)))},
    )
    guard.save_pretrained(out / "guard")
    summary = {"held_out": figures, "run": run_manifest(command, [run.detector.seed], run)}
    replace_file(out / "summary.json", (json.dumps(summary, indent=1, default=str) + "\n").encode())
    return summary


def _label(data: DataConfig) -> str:
    """What a card calls a source."""
    return data.source if data.forms == DataConfig.forms else f"{data.source}, other forms"


Parts = tuple[list[TokenRecord], list[TokenRecord], list[TokenRecord]]


def _parts(data: DataConfig, share: float, backend: HFBackend) -> Parts:
    """Training, validation and held-out records of a source."""
    train, held = hops_for(data)
    if not train or not held:
        raise ValueError(f"{data.source}: {len(train)} training and {len(held)} held-out records")
    fitted, chosen = split_hops(train, 1 - share, data.seed)
    encode = backend.encoder.encode
    return encode(fitted), encode(chosen), encode(held)


def measure_detector(
    data: DataConfig, model: str, guard: str, against: str | None, command: str
) -> dict[str, Any]:
    """Figures of a guard's detector on a source's records, with Presidio's beside them."""
    backend = load_backend(model)
    loaded = load_guard(GuardSpec("detector", path=guard), backend)
    hops = all_hops(data)
    records = backend.encoder.encode(hops)
    out: dict[str, Any] = {
        "source": data.source,
        "model": model,
        "guard": guard,
        "records": len(records),
        **measure(records, found_by(loaded, backend.source, records)),
    }
    if against:
        out[against] = measure(records, PresidioText().marks(hops, backend.encoder))
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
