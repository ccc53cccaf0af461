"""Fits the detector of guard ``twin``: which tokens belong to a value of which category.

Binary cross-entropy per token and category on labelled records, what a value and what the task
needs weighted up. The model is frozen and read once: a record's features are kept, so an epoch
costs the small network alone. Thresholds come afterwards, from validation records: every value that
is missed stands in clear, every task value that is touched costs the receiver an answer, and
``touch_cost`` says how many of the first one of the second is worth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.canonical import canonical_digest
from lcguard.categories import CATEGORIES
from lcguard.guards.twin import TwinGuard
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord, TokenSpan, masks, value_labels
from lcguard.source import ModelSource
from lcguard.training.descent import Descent
from lcguard.training.hard_examples import NOTHING, Emphasis
from lcguard.training.kept_tensors import KeptTensors


@dataclass(frozen=True)
class DetectorConfig:
    steps: int = 900
    batch: int = 16
    lr: float = 1.5e-3
    warmup: int = 30
    value_weight: float = 3.0
    """Of a value's tokens against others."""
    task_weight: float = 3.0
    """Of a task value's tokens: to hide those costs the receiver most."""
    dropout: float = 0.15
    """Share of the features that a record of a step does without."""
    touch_cost: float = 0.3
    """What a touched task value costs, in missed values."""
    thresholds: tuple[float, float] = (-7.0, 0.0)
    """Lowest and highest threshold that may be chosen."""
    peaks: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    """Of guard ``twin``: those that may be chosen."""
    seed: int = 0


@dataclass(frozen=True)
class ReadRecords:
    """Records with what the detector reads of them, one tensor ``[T, F]`` each, as bfloat16."""

    records: tuple[TokenRecord, ...]
    features: tuple[Tensor, ...]
    hard: tuple[tuple[TokenSpan, ...], ...] = ()
    """Of each record the values that attackers recovered; empty: of none any."""

    def hard_of(self, i: int) -> tuple[TokenSpan, ...]:
        return self.hard[i] if self.hard else ()

    def part(self, at: Sequence[int]) -> ReadRecords:
        """Those of the records alone."""
        return ReadRecords(
            tuple(self.records[i] for i in at),
            tuple(self.features[i] for i in at),
            tuple(self.hard_of(i) for i in at),
        )

    def __add__(self, other: ReadRecords) -> ReadRecords:
        both = (self.part(range(len(self.records))), other.part(range(len(other.records))))
        return ReadRecords(
            both[0].records + both[1].records,
            both[0].features + both[1].features,
            both[0].hard + both[1].hard,
        )

    def batches(self, size: int) -> Iterator[tuple[list[TokenRecord], Tensor, Tensor]]:
        """All of them, shortest first: records, features ``[B, T, F]`` and valid ``[B, T]``."""
        order = sorted(range(len(self.records)), key=lambda i: len(self.features[i]))
        for first in range(0, len(order), size):
            yield self.rows(order[first : first + size])

    def rows(self, at: Sequence[int]) -> tuple[list[TokenRecord], Tensor, Tensor]:
        width = max(len(self.features[i]) for i in at)
        x = torch.zeros(len(at), width, self.features[at[0]].shape[1])
        valid = torch.zeros(len(at), width, dtype=torch.bool)
        for row, i in enumerate(at):
            n = len(self.features[i])
            x[row, :n], valid[row, :n] = self.features[i].float(), True
        return [self.records[i] for i in at], x, valid


@torch.no_grad()
def read_records(
    module: TwinGuard,
    records: Sequence[TokenRecord],
    source: ModelSource,
    batch: int = 16,
    progress: Callable[[int], None] = lambda n: None,
    kept: KeptTensors | None = None,
) -> ReadRecords:
    """Prefills each distinct context once, or takes what ``kept`` has of it. Statistics are fitted
    on some of the first records where the module has none."""
    contexts = sorted({r.ids for r in records}, key=len)
    kept = kept or KeptTensors()
    if bool((module.center == 0).all()):
        some = random.Random(0).sample(contexts, min(128, len(contexts)))
        found = kept.get(["statistics", some])
        if found is None:
            module.fit_statistics(_float(source.prefill(some, batch)))
            kept.put(["statistics", some], {"center": module.center, "scale": module.scale})
        else:
            module.center.copy_(found["center"])
            module.scale.copy_(found["scale"])
    read = [list(module.layers), module.center.tolist(), module.scale.tolist()]
    statistics = canonical_digest(read)
    known: dict[tuple[int, ...], Tensor] = {}
    for ids in contexts:
        if (found := kept.get([statistics, ids])) is not None:
            known[ids] = found["x"]
    progress(len(known))
    missing = [ids for ids in contexts if ids not in known]
    for first in range(0, len(missing), batch):
        part = missing[first : first + batch]
        x = module.features(source.prefill(part, batch)).cpu()
        for ids, row in zip(part, x, strict=True):
            known[ids] = row[: len(ids)].to(torch.bfloat16, copy=True)
            kept.put([statistics, ids], {"x": known[ids]})
        progress(len(part))
    return ReadRecords(tuple(records), tuple(known[r.ids] for r in records))


def _float(kv: KVBatch) -> KVBatch:
    return KVBatch(kv.keys.float(), kv.values.float(), kv.valid)


def fit_detector(
    module: TwinGuard,
    data: Sequence[ReadRecords],
    config: DetectorConfig,
    say: Callable[[int, float], None] = lambda step, loss: None,
    emphasis: Emphasis = NOTHING,
) -> None:
    """Trains in place. ``data``: one entry per source; every source is drawn from as often.
    ``emphasis``: what weighs more, and where labels are less certain.

    Raises ``ValueError`` for a source without records, or a loss that is not finite.
    """
    if not data or any(not d.records for d in data):
        raise ValueError("a source has no records to train a detector on")
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    descent = Descent(
        module.detector.parameters(), config.steps, config.lr, config.warmup, weight_decay=0.01
    )
    module.train()
    for step in range(config.steps):
        source = data[step % len(data)]
        at = [rng.randrange(len(source.records)) for _ in range(config.batch)]
        records, x, valid = source.rows(at)
        y = value_labels(records, x)
        if config.dropout:  # whole features: neighbouring tokens would tell what single ones lack
            kept = torch.rand(len(x), 1, x.shape[2]) >= config.dropout
            x = x * kept / (1 - config.dropout)
        logits = module.detector(x, valid)
        weight = torch.where(y > 0, config.value_weight, _task_weight(records, x, config))
        weight = emphasis.weighted(weight, records, [source.hard_of(i) for i in at])
        target = emphasis.target(logits, y)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
        loss = each[valid].mean()
        say(step, descent.down(step, loss))
    module.eval()


def _task_weight(records: Sequence[TokenRecord], like: Tensor, config: DetectorConfig) -> Tensor:
    """``[B, T, 1]``."""
    out = torch.ones(*like.shape[:2], 1)
    for row, record in zip(out, records, strict=True):
        for span in record.spans:
            if span.category is None:
                row[span.start : span.end] = config.task_weight
    return out


@torch.no_grad()
def choose_thresholds(
    module: TwinGuard, data: Sequence[ReadRecords], config: DetectorConfig
) -> tuple[float, ...]:
    """For each category the threshold that costs least: the share of its values that are missed,
    and ``touch_cost`` times the share of task values that are touched, every source counting alike.

    A value is found once all its tokens are above, a task value is touched once any is. That a run
    needs a ``peak`` spares most of the touched ones, and is not counted on here
    (``choose_peak``). A category without
    validation values takes the lowest threshold.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in CATEGORIES]
    touched: list[list[tuple[float, float]]] = [[] for _ in CATEGORIES]
    for source in data:
        spans = [s for r in source.records for s in r.spans]
        each_task = config.touch_cost / max(1, sum(s.category is None for s in spans))
        each_value = 1 / max(1, sum(s.category is not None for s in spans))
        for records, x, valid in source.batches(config.batch):
            for row, record in zip(module.detector(x, valid), records, strict=True):
                for span, c in record.categorised():
                    lowest = float(row[span.start : span.end, c].min())
                    found[c].append((lowest, each_value))
                for span in record.spans:
                    if span.category is None:
                        highest = row[span.start : span.end].max(0).values
                        for c, forbidden in enumerate(CATEGORIES):
                            if forbidden in record.forbid:
                                touched[c].append((float(highest[c]), each_task))
    low, high = config.thresholds
    return tuple(_cheapest(v, t, low, high) for v, t in zip(found, touched, strict=True))


def choose_peak(module: TwinGuard, data: Sequence[ReadRecords], config: DetectorConfig) -> float:
    """The lowest of ``config.peaks`` that costs least as ``choose_thresholds`` counts, now of what
    the guard with its thresholds would hide under the records' policies."""
    costs = hiding_costs(module, data, config.peaks, config)
    return min(costs, key=costs.__getitem__)


@torch.no_grad()
def hiding_costs(
    module: TwinGuard,
    data: Sequence[ReadRecords],
    peaks: Sequence[float],
    config: DetectorConfig,
) -> dict[float, float]:
    """Of each peak the share of forbidden values that are not hidden whole, and ``touch_cost``
    times that of task values that are touched; the sources' sum."""
    costs = dict.fromkeys(peaks, 0.0)
    for source in data:
        spans = [s for r in source.records for s in r.spans]
        each_value = 1 / max(1, sum(s.secret for s in spans))
        each_task = config.touch_cost / max(1, sum(s.category is None for s in spans))
        for records, x, valid in source.batches(config.batch):
            logits, mask = module.detector(x, valid), masks(records)
            for peak in costs:
                marks = module.marks_of(logits, valid, mask, peak) >= 0
                for row, record in zip(marks, records, strict=True):
                    for span in record.spans:
                        hidden = row[span.start : span.end]
                        if span.category is None:
                            costs[peak] += each_task * bool(hidden.any())
                        elif span.secret:
                            costs[peak] += each_value * (not hidden.all())
    return costs


def _cheapest(
    values: Sequence[tuple[float, float]],
    tasks: Sequence[tuple[float, float]],
    low: float,
    high: float,
) -> float:
    """Both lists hold logits and what a wrong one costs."""
    if not values:
        return low
    # just below a value that is to be found
    candidates = {round(min(high, max(low, x - 1e-3)), 3) for x, _ in values}

    def cost(threshold: float) -> tuple[float, float]:
        missed = sum(w for x, w in values if x <= threshold)
        return missed + sum(w for x, w in tasks if x > threshold), -threshold

    return min(candidates, key=cost)
