"""Fits the guards that rewrite the sender's one prefill: ``trace_gate`` and ``kveraser``.

Both are distilled on the twin, the prefill of the same context with neutral tokens for what the
policy forbids; the values' places are told in training. ``trace_gate`` is fitted on the difference
of the two caches, read once: no gradient runs through the model. ``kveraser`` is fitted on what the
receiver answers, so each of its steps goes through the receiver and back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.kveraser import KVEraserGuard
from lcguard.guards.single_pass import Found, SinglePassGuard
from lcguard.guards.trace_gate import TraceGateGuard
from lcguard.protocols import KVBatch
from lcguard.records import IGNORE, TokenRecord, pack_questions
from lcguard.source import ModelSource
from lcguard.training.dataset import with_policy
from lcguard.training.descent import Descent
from lcguard.training.fit_detector import ReadRecords
from lcguard.training.secret_traces import outside
from lcguard.training.twins import forbidden_spans, neutral_twin
from lcguard.training.uncertain_teacher import token_kl

Say = Callable[[int, float], None]


@dataclass(frozen=True)
class SinglePassConfig:
    steps: int = 300
    batch: int = 8
    """Records a step."""
    lr: float = 1.5e-3
    warmup: int = 20
    questions: int = 4
    """A record and step, at most; for ``kveraser``."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Traces(NamedTuple):
    """What was read of records, each a tensor of its own tokens."""

    read: ReadRecords
    difference: list[Tensor]
    """``[N, L, 2, W]``, of the N tokens behind values: raw less twin."""
    constant: Tensor
    """``[L, 2, W]``: the twin's mean where neutral tokens stand."""


def policies(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """Those with something to hide: every other one under its own policy, the rest under one that
    forbids everything. Raises ``ValueError`` where none has anything."""
    mixed = [r if i % 2 else with_policy([r], CATEGORIES)[0] for i, r in enumerate(records)]
    out = [r for r in mixed if forbidden_spans(r, r.forbid)]
    if not out:
        raise ValueError(f"none of {len(records)} records has a value to hide: give others")
    return out


def told(records: Sequence[TokenRecord], valid: Tensor) -> Found:
    """Where the values stand that the records' policies forbid."""
    return Found.of(valid & ~outside(records, valid), valid)


def both_prefills(
    records: Sequence[TokenRecord], source: ModelSource, neutral_id: int
) -> tuple[KVBatch, KVBatch]:
    """Raw KV and the twin's, in one pass."""
    twins = [neutral_twin(r, r.forbid, neutral_id) for r in records]
    kv = source.prefill([r.ids for r in records] + twins, 2 * len(records))
    return kv[: len(records)], kv[len(records) :]


@torch.no_grad()
def read_traces(
    module: SinglePassGuard,
    records: Sequence[TokenRecord],
    source: ModelSource,
    neutral_id: int,
    batch: int = 8,
) -> Traces:
    """Prefills each record twice. 23 kB a token in bfloat16 at 30 layers of 3 heads of 64."""
    features, difference = list[Tensor](), list[Tensor]()
    total, count = torch.zeros_like(module.center), 0
    records = sorted(records, key=lambda r: len(r.ids))
    for first in range(0, len(records), batch):
        part = records[first : first + batch]
        raw, twin = both_prefills(part, source, neutral_id)
        z, other = module.standardise(raw), module.standardise(twin)
        found, x = told(part, raw.valid), module.features(z)
        at = other[found.hidden]
        total, count = total + at.sum(0), count + len(at)
        for i, record in enumerate(part):
            features.append(x[i, : len(record.ids)].to(torch.bfloat16, copy=True))
            away = z[i][found.later[i]] - other[i][found.later[i]]
            difference.append(away.to(torch.bfloat16, copy=True))
    read = ReadRecords(tuple(records), tuple(features))
    return Traces(read, difference, total / count)


def fit_trace_gate(
    module: TraceGateGuard,
    traces: Traces,
    config: SinglePassConfig,
    say: Say = lambda step, loss: None,
) -> dict[str, float]:
    """In place: the directions and the constant in closed form, then the network that expects
    traces. Says which shares of the traces' energy lie along U, and of that it takes away.

    Raises ``ValueError`` where no token stands behind a value, or the loss is not finite.
    """
    covariance, count = torch.zeros(()), 0
    for each in traces.difference:
        d = each.float()
        covariance = covariance + torch.einsum("nlkc,nlkd->lkcd", d, d)
        count += len(d)
    if not count:
        raise ValueError("no token stands behind a value: secrets leave no traces to measure")
    inside = module.shape_noise(covariance / count, traces.constant)
    targets = [module.along(d.float()[None])[0].to(torch.bfloat16) for d in traces.difference]
    rng = random.Random(f"trace gate/{config.seed}")
    torch.manual_seed(config.seed)
    descent = Descent(module.reader.parameters(), config.steps, config.lr, config.warmup, 0.01)
    module.train()
    some = [i for i, t in enumerate(targets) if len(t)]
    for step in range(config.steps):
        at = rng.sample(some, min(config.batch, len(some)))
        error, due = _unexplained(module, traces, targets, at)
        say(step, descent.down(step, error / due))
    module.eval()
    with torch.no_grad():
        missed = energy = 0.0
        for i in some:
            error, _ = _unexplained(module, traces, targets, [i])
            missed += float(error)
            energy += float(targets[i].float().square().sum())
    return {"along_directions": inside, "taken_away": 1 - missed / energy}


def _unexplained(
    module: TraceGateGuard, traces: Traces, targets: Sequence[Tensor], at: Sequence[int]
) -> tuple[Tensor, int]:
    """Squared error over the tokens behind values of some records, and how many numbers it is
    of."""
    records, x, valid = traces.read.rows(at)
    hidden, later = told(records, valid)
    expected = module.reader(x, hidden, valid, module.twin.detector.reach)[later]
    due = torch.cat([targets[i] for i in at]).float()
    return (expected - due).square().sum(), due.numel()


def fit_kveraser(
    module: KVEraserGuard,
    records: Sequence[TokenRecord],
    source: ModelSource,
    neutral_id: int,
    config: SinglePassConfig,
    say: Say = lambda step, loss: None,
) -> None:
    """In place: the receiver on the rewritten prefill is to answer as on the twin's.

    Raises ``ValueError`` where no record has a question, or the loss is not finite.
    """
    asked = [r for r in records if r.questions]
    if not asked:
        raise ValueError(f"none of {len(records)} records has a question: give others")
    rng = random.Random(f"kveraser/{config.seed}")
    torch.manual_seed(config.seed)
    weights = [*module.reader.parameters(), module.constant, module.directions]
    descent = Descent(weights, config.steps, config.lr, config.warmup)
    module.train()
    for step in range(config.steps):
        chosen = [
            replace(
                r, questions=tuple(rng.sample(r.questions, min(config.questions, len(r.questions))))
            )
            for r in rng.sample(asked, min(config.batch, len(asked)))
        ]
        raw, twin = both_prefills(chosen, source, neutral_id)
        packed = pack_questions(chosen, pad_id=source.pad_id)
        z = module.standardise(raw)
        sent = module.restore(module.replaced(z, raw.valid, told(chosen, raw.valid)), raw)
        with torch.no_grad():
            teacher = source.answer_logits(twin, packed).float()
        due = packed.labels[packed.labels != IGNORE]
        each = token_kl(source.answer_logits(sent, packed).float(), teacher)
        say(step, descent.down(step, each.sum() / max(1, due.numel())))
    module.eval()
