"""The loss of one training step.

    L = a KL(receiver on raw || receiver on guarded) + b CE(answers)
        + c log1p(pair leak / s) + d twin distance + e withheld share - beta L_rec

Pair leak, in nats: ``||m(raw) - m(raw')||^2 / (2 sigma^2)``, with raw' the same context whose
forbidden secrets are resampled, through the whole guard (our own; evidence in docs/results.md). It
bounds what one draw of the segment tells about the secrets; the certificate takes it on the grid
that the means are rounded to, which has no gradient. ``log1p`` keeps a large leak from
drowning the receiver's loss. The adversarial term is the minimax of arXiv 2605.22786.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.guards.base import GuardModule
from lcguard.protocols import KVBatch, Mask
from lcguard.records import IGNORE, TokenQuestion, TokenRecord, masks, pack_questions
from lcguard.source import ModelSource
from lcguard.training.config import PolicyMix, TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.twins import ValuePool, neutral_twin


def sample_policy(rng: random.Random, mix: PolicyMix) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Forbidden categories, and those of them that keep their derived value."""
    kind = rng.random()
    if kind < mix.none_rate:
        return (), ()
    everything = kind < mix.none_rate + mix.all_rate
    # every number of categories as often as every other: one alone is a policy too
    count = len(CATEGORIES) if everything else rng.randint(1, len(CATEGORIES) - 1)
    drawn = set(rng.sample(CATEGORIES, count))
    forbid = tuple(c for c in CATEGORIES if c in drawn)
    derive = tuple(c for c in forbid if c in DERIVABLE and rng.random() < mix.derive_rate)
    return forbid, derive


def permitted(record: TokenRecord, question: TokenQuestion) -> bool:
    """May this audience have the answer?"""
    if question.category is None or question.category not in record.forbid:
        return True
    return question.kind == "derived" and question.category in record.derive


def draw_batch(rng: random.Random, records: Sequence[TokenRecord], size: int) -> list[TokenRecord]:
    """``size`` records of similar length, so that little of a batch is padding.

    ``records`` are sorted by length: the batch comes from an eighth of them around a random place.
    """
    size = min(size, len(records))
    width = max(size, len(records) // 8)
    first = rng.randint(-(width // 2), len(records) - width // 2)
    first = max(0, min(first, len(records) - width))
    return rng.sample(records[first : first + width], size)


@dataclass(frozen=True)
class StepData:
    """What one step sees."""

    records: list[TokenRecord]
    raw: KVBatch
    pair: KVBatch | None
    twin: KVBatch | None
    mask: Mask
    before: KVBatch | None = None
    """What the receiver reads in front of each segment, row by row; nothing where no token is
    valid."""


def step_data(
    rng: random.Random,
    records: Sequence[TokenRecord],
    pool: ValuePool,
    source: ModelSource,
    config: TrainConfig,
    neutral_id: int,
    module: GuardModule,
    generator: torch.Generator,
) -> StepData:
    """Draws records, policies, questions and counterfactuals, and prefills them.

    With ``path_hops`` above 1 the batch is so many hops of as many paths, hop after hop: each hop's
    contexts and their counterfactuals are prefilled on top of the same guarded segment of the hop
    before. No gradient runs back through a hop: given the segment that was handed on, nothing later
    depends on its sender's secrets, so what a path leaks is the sum of what its segments leak.
    """
    chosen = []
    for record in draw_batch(rng, records, config.batch):
        (record,) = with_policy([record], *sample_policy(rng, config.policies))
        questions = [q for q in record.questions if permitted(record, q)]
        rng.shuffle(questions)
        # allowed derived answers first: they are rare and the hardest to keep
        questions.sort(key=lambda q: q.category not in record.derive)
        chosen.append(replace(record, questions=tuple(questions[: config.questions])))
    n_paths = max(1, len(chosen) // config.path_hops)
    chosen = chosen[: n_paths * config.path_hops]  # fewer records than a batch: whole paths only
    merge = config.path_hops > 1 and rng.random() < config.merge_rate
    hops: list[StepData] = []
    before: KVBatch | None = None
    for first in range(0, len(chosen), n_paths):
        hop = _prefill_hop(
            rng, chosen[first : first + n_paths], pool, source, config, neutral_id, before
        )
        if config.path_hops > 1:
            rows = len(hop.records)
            past = None if before is None else before[:rows]
            if merge:
                hop = _merged(hop, past, hops[-1].records if hops else [])
            with torch.no_grad():
                before = module(hop.raw, hop.mask, generator)[0]
        hops.append(hop)
    return hops[0] if len(hops) == 1 else _stack(hops)


def _prefill_hop(
    rng: random.Random,
    chosen: list[TokenRecord],
    pool: ValuePool,
    source: ModelSource,
    config: TrainConfig,
    neutral_id: int,
    on: KVBatch | None,
) -> StepData:
    """Contexts of one hop with their counterfactuals, in one forward pass."""
    contexts = [r.ids for r in chosen]
    n, want_pair, want_twin = len(chosen), config.pair_weight > 0, config.twin_weight > 0
    if want_pair:
        contexts += [pool.resample(rng, r, r.forbid, r.derive) for r in chosen]
    if want_twin:
        contexts += [neutral_twin(r, r.forbid, neutral_id) for r in chosen]
    if on is not None:
        on = KVBatch.stack([on[:n]] * (len(contexts) // n))
    kv = source.prefill(contexts, len(contexts), on)
    return StepData(
        chosen,
        kv[:n],
        kv[n : 2 * n] if want_pair else None,
        kv[-n:] if want_twin else None,
        masks(chosen),
    )


def _merged(hop: StepData, past: KVBatch | None, others: Sequence[TokenRecord]) -> StepData:
    """The receiver reads what came before first, and is not asked about a field of both."""
    if past is None:
        raw = hop.raw
        past = KVBatch(
            raw.keys[..., :1, :], raw.values[..., :1, :], torch.zeros_like(raw.valid[:, :1])
        )
        return replace(hop, before=past)
    records = []
    for record, other in zip(hop.records, others, strict=False):
        twice = {s.field for s in other.spans}
        questions = tuple(q for q in record.questions if q.field not in twice)
        records.append(replace(record, questions=questions))
    return replace(hop, records=records, before=past)


def _stack(hops: Sequence[StepData]) -> StepData:
    """Hops as one batch, hop after hop."""

    def stacked(parts: Sequence[KVBatch | None]) -> KVBatch | None:
        found = [p for p in parts if p is not None]
        return KVBatch.stack(found) if found else None

    raw = stacked([h.raw for h in hops])
    assert raw is not None
    return StepData(
        [r for h in hops for r in h.records],
        raw,
        stacked([h.pair for h in hops]),
        stacked([h.twin for h in hops]),
        Mask(
            *(torch.cat(x) for x in ([h.mask.forbid for h in hops], [h.mask.derive for h in hops]))
        ),
        stacked([h.before for h in hops]),
    )


class Losses(NamedTuple):
    total: Tensor
    metrics: dict[str, float]
    guarded: KVBatch


def pair_leak_nats(first: Tensor, second: Tensor, valid: Tensor, noise: float) -> Tensor:
    """``[B]`` nats between two guards' means ``[B, T, L, 2, H * D]``.

    Raises ``ValueError`` for a guard without noise: its pair leak is infinite.
    """
    if noise <= 0:
        raise ValueError(f"noise {noise} must be positive: without noise the pair leak is infinite")
    distance = (first - second).square().sum((2, 3, 4)) * valid
    return distance.sum(1) / (2 * noise**2)


def guard_losses(
    module: GuardModule,
    data: StepData,
    source: ModelSource,
    config: TrainConfig,
    generator: torch.Generator,
    step: int,
    pool: ValuePool,
) -> Losses:
    """Everything but the adversarial term; differentiable in the guard."""
    guarded, out = module(data.raw, data.mask, generator)
    ramp = min(1.0, (step + 1 - config.label_steps) / max(1, config.leak_ramp))
    total, metrics = receiver_loss(guarded, data, source, config)
    if data.pair is not None:
        other = module.rewrite(module.standardise(data.pair), data.pair.valid, data.mask)
        leak = pair_leak_nats(out.mean, other.mean, data.raw.valid, module.config.noise)
        hidden = data.mask.forbid.any(1)
        scaled = torch.log1p(leak / config.leak_scale_nats)
        total = total + ramp * config.pair_weight * scaled.mean()
        if config.label_weight and out.by_category is not None:
            labels = closing_loss(out.by_category, data.records, config.open_weight)
            if out.words is not None:
                labels = labels + word_loss(out.words, data.records, pool)
            total = total + config.label_weight * labels
            metrics["label_nats"] = float(labels.detach())
        metrics["pair_nats"] = float(leak.detach()[hidden].mean()) if bool(hidden.any()) else 0.0
    if data.twin is not None:
        gap = (out.mean - module.standardise(data.twin)).square().mean((2, 3, 4))
        gap = (gap * data.raw.valid).sum() / data.raw.valid.sum()
        total = total + ramp * config.twin_weight * gap
        metrics["twin_mse"] = float(gap.detach())
    share = (out.withheld * data.raw.valid).sum() / data.raw.valid.sum()
    if config.gate_weight and out.withheld.requires_grad:
        total = total + config.gate_weight * share
    metrics["withheld"] = float(share.detach())
    return Losses(total, metrics, guarded)


def value_labels(records: Sequence[TokenRecord], like: Tensor) -> Tensor:
    """``[B, T, C]``: one where a token belongs to a value of the category."""
    value = torch.zeros(like.shape[:3], device=like.device)
    for i, record in enumerate(records):
        for span in record.spans:
            if span.category is not None:
                value[i, span.start : span.end, CATEGORIES.index(span.category)] = 1.0
    return value


def word_loss(words: Tensor, records: Sequence[TokenRecord], pool: ValuePool) -> Tensor:
    """Cross-entropy in nats: on a secret with a band, the word that stands for its band.

    ``words``: logits ``[B, T, C, W]``. Only which word it is is taught here; what a word says to
    the receiver, the receiver's loss teaches the codebook.
    """
    label = torch.full(words.shape[:3], IGNORE, device=words.device)
    for i, record in enumerate(records):
        for span in record.spans:
            word = pool.word(span, words.shape[-1])
            if span.category is not None and word is not None:
                label[i, span.start : span.end, CATEGORIES.index(span.category)] = word
    if not bool((label != IGNORE).any()):
        return words.sum() * 0.0
    return F.cross_entropy(words.flatten(0, 2), label.flatten(), ignore_index=IGNORE)


def label_loss(
    module: GuardModule, records: Sequence[TokenRecord], raw: KVBatch, pool: ValuePool
) -> Tensor:
    """Cross-entropy in nats a token: each category's gates close on its values, and there alone;
    and the words name the bands.

    Raises ``ValueError`` for a guard without gates.
    """
    everything = torch.ones(len(records), module.n_categories, dtype=torch.bool)
    out = module.rewrite(module.standardise(raw), raw.valid, Mask(everything, ~everything))
    if out.by_category is None:
        raise ValueError(f"guard {module.name!r} has no gates to label; set label_steps to 0")
    own = out.by_category.flatten(3)[raw.valid]
    value = value_labels(records, out.by_category)[raw.valid][..., None].expand_as(own)
    # open, but not so firmly that the pair leak could not close it any more
    value = value.clamp(0.01, 1.0)
    loss = F.binary_cross_entropy_with_logits(own, value, reduction="none")
    labels = loss.mean(-1).sum(-1).mean()
    return labels if out.words is None else labels + 0.1 * word_loss(out.words, records, pool)


def closing_loss(
    by_category: Tensor, records: Sequence[TokenRecord], open_weight: float = 0.0
) -> Tensor:
    """Cross-entropy in nats of closing each category's gates on its own values and, weighted by
    ``open_weight``, of opening them on those of the other categories.

    What else they close on, what follows a value, is for the pair leak to say.
    """
    value = value_labels(records, by_category).bool()
    if not bool(value.any()):
        return by_category.sum() * 0.0
    own = by_category[:, :, :, 0]
    loss = F.softplus(-own[value]).mean()
    if open_weight:
        others = value.any(2, keepdim=True) & ~value
        loss = loss + open_weight * F.softplus(own[others]).mean()
    return loss


def receiver_loss(
    guarded: KVBatch, data: StepData, source: ModelSource, config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    """Distillation and cross-entropy on the answers that the audience may have."""
    raw = data.raw
    if data.before is not None:
        guarded, raw = (KVBatch.join([data.before, x]) for x in (guarded, raw))
    packed = pack_questions(data.records, pad_id=source.pad_id)
    labels = packed.labels[packed.labels != IGNORE].to(guarded.keys.device)
    if not len(labels):
        return guarded.keys.sum() * 0.0, {"accuracy": float("nan")}
    weight = answer_weights(data.records, packed.labels, packed.block, config)
    weight = weight.to(labels.device) / weight.sum()
    logits = source.answer_logits(guarded, packed)
    total = config.ce_weight * (F.cross_entropy(logits, labels, reduction="none") * weight).sum()
    if config.kl_weight:
        with torch.no_grad():
            teacher = source.answer_logits(raw, packed) / config.temperature
        kl = F.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        total = total + config.kl_weight * (kl * weight).sum()
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    return total, {"accuracy": accuracy, "task_nats": float(total.detach())}


def answer_weights(
    records: Sequence[TokenRecord], labels: Tensor, block: Tensor, config: TrainConfig
) -> Tensor:
    """``[N]``: 1 for a task answer's token, the configured weights for secret categories."""
    weight = torch.ones_like(labels, dtype=torch.float32)
    for i, record in enumerate(records):
        for j, q in enumerate(record.questions):
            if q.category is not None:
                hidden = q.category in record.forbid
                weight[i][block[i] == j] = config.band_weight if hidden else config.allowed_weight
    return weight[labels != IGNORE]
