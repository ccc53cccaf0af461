"""The loss of one training step.

    L = a KL(receiver on raw || receiver on guarded) + b CE(answers)
        + c log1p(pair leak / s) + t CVaR_a(log1p(leak of one secret / s))
        + d twin distance + e withheld share - beta L_rec
        + options, each in a file of its own: ``uncertain_teacher``, ``rare_categories``,
          ``secret_traces``, ``category_adversary``

Pair leak, in nats: ``||m(raw) - m(raw')||^2 / (2 sigma^2)``, with raw' the same context whose
forbidden secrets are resampled, through the whole guard (our own; evidence in docs/results.md). It
bounds what one draw of the segment tells about the secrets; the certificate takes it on the grid
that the means are rounded to, which has no gradient. ``log1p`` keeps a large leak from
drowning the receiver's loss. The term t is the mean over the worst share a of a batch, of pairs
that differ in one secret (conditional value at risk, Rockafellar and Uryasev 2000): what an
attacker recovers comes from few contexts that leak much, which a mean over all of them hardly sees.
The adversarial term is the minimax of arXiv 2605.22786.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.guards.base import GuardModule
from lcguard.protocols import KVBatch
from lcguard.records import IGNORE, TokenRecord, pack_questions
from lcguard.source import ModelSource
from lcguard.training.category_adversary import CategoryAdversary
from lcguard.training.config import TrainConfig
from lcguard.training.label_loss import closing_loss, word_loss
from lcguard.training.rare_categories import category_weights, record_weights, warmed
from lcguard.training.secret_traces import displaced
from lcguard.training.shards import ALONE, Shards
from lcguard.training.steps import StepData
from lcguard.training.twins import ValuePool
from lcguard.training.uncertain_teacher import softened, token_kl


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


@dataclass(frozen=True)
class Objective:
    """The loss of a run; ``losses`` is everything but the adversarial term."""

    config: TrainConfig
    source: ModelSource
    pool: ValuePool
    shards: Shards = ALONE
    category_shares: Mapping[str, float] = field(default_factory=dict)
    """Of the training secrets, for ``rare_strength``."""
    traces: Tensor | None = None
    """``secret_traces.root``, for ``trace_weight``."""
    category_adversary: CategoryAdversary | None = None
    """For ``category_weight``."""

    def losses(
        self, module: GuardModule, data: StepData, generator: torch.Generator, step: int
    ) -> Losses:
        """Differentiable in the guard. Loss and metrics are this process's part, which sums over
        all of them make those of the whole batch."""
        config, share = self.config.at(step), self.shards.share
        draws = self.shards.draws(generator, data.n_paths, data.hops)
        guarded, out = module(data.raw, data.mask, draws)
        ramp = min(1.0, (step + 1 - config.label_steps) / max(1, config.leak_ramp))
        total, metrics = self._receiver(guarded, data, config)

        def leaked(z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            """``[B]`` nats of the pairs with other contexts, and as the loss counts them."""
            other = module.rewrite(z, valid, data.mask)
            leak = pair_leak_nats(out.mean, other.mean, data.raw.valid, module.config.noise)
            return leak, torch.log1p(leak / config.leak_scale_nats)

        if data.pair is not None:
            leak, scaled = leaked(module.standardise(data.pair), data.pair.valid)
            hidden = data.mask.forbid.any(1)
            each = scaled * self._rare(data, config, step).to(scaled.device)
            total = total + ramp * config.pair_weight * each.mean() * share(len(scaled))
            if config.label_weight and out.by_category is not None:
                labels = closing_loss(
                    out.by_category, data.records, config.open_weight, self.shards
                )
                if out.words is not None:
                    labels = labels + word_loss(out.words, data.records, self.pool, self.shards)
                total = total + config.label_weight * labels
                metrics["label_nats"] = float(labels.detach())
            n_hidden = int(hidden.sum())
            part = share(n_hidden)
            metrics["pair_nats"] = float(leak.detach()[hidden].mean()) * part if n_hidden else 0.0
        if data.one_other is not None:
            one = data.one_other
            leak, scaled = leaked(module.standardise(one), one.valid)
            tail = self.shards.worst_mean(scaled, config.tail_share)
            total = total + ramp * config.tail_weight * tail
            metrics["tail_nats"] = float(self.shards.worst_mean(leak.detach(), config.tail_share))
        tokens = share(int(data.raw.valid.sum()))
        if data.twin is not None and config.twin_weight:
            gap = (out.mean - module.standardise(data.twin)).square().mean((2, 3, 4))
            gap = (gap * data.raw.valid).sum() / data.raw.valid.sum() * tokens
            total = total + ramp * config.twin_weight * gap
            metrics["twin_mse"] = float(gap.detach())
        if self.traces is not None and config.trace_weight:
            z = module.standardise(data.raw)
            normal = self.shards.normal(generator, z.shape, data.n_paths, data.hops)
            moved = displaced(z, self.traces, data.records, data.raw.valid, normal)
            leak, scaled = leaked(moved, data.raw.valid)
            asked, part = data.mask.forbid.any(1).to(leak.device), share(len(leak))
            total = total + ramp * config.trace_weight * (scaled * asked).mean() * part
            metrics["trace_nats"] = float((leak.detach() * asked).mean()) * part
        if self.category_adversary is not None:
            sent = module.standardise(guarded)
            named = self.category_adversary.loss(sent, data.raw.valid, data.records, self.shards)
            total = total + config.category_weight * named
            metrics["category_nats"] = float(named.detach())
        withheld = (out.withheld * data.raw.valid).sum() / data.raw.valid.sum() * tokens
        if config.gate_weight and out.withheld.requires_grad:
            total = total + config.gate_weight * withheld
        metrics["withheld"] = float(withheld.detach())
        return Losses(total, metrics, guarded)

    def _rare(self, data: StepData, config: TrainConfig, step: int) -> Tensor:
        """``[B]`` weights of the records' leaks."""
        if not config.rare_strength:
            return torch.ones(len(data.records))
        strength = warmed(config.rare_strength, step, config.steps, config.rare_warmup)
        return record_weights(data.records, category_weights(self.category_shares, strength))

    def _receiver(
        self, guarded: KVBatch, data: StepData, config: TrainConfig
    ) -> tuple[Tensor, dict[str, float]]:
        """Distillation and cross-entropy on the answers that the audience may have."""
        taught = data.raw
        if config.teacher == "twin":
            assert data.twin is not None
            taught = data.twin
        if data.before is not None:
            guarded, taught = (KVBatch.join([data.before, x]) for x in (guarded, taught))
        packed = pack_questions(data.records, pad_id=self.source.pad_id)
        labels = packed.labels[packed.labels != IGNORE].to(guarded.keys.device)
        answered = self.shards.share(len(labels))
        if not len(labels):
            self.shards.share(0.0)
            nothing = float("nan")
            return guarded.keys.sum() * 0.0, {"accuracy": nothing, "task_nats": nothing}
        weight = answer_weights(data.records, packed.labels, packed.block, config)
        part = self.shards.share(float(weight.sum()))
        scale = part / weight.sum()
        if config.teacher == "twin":  # it does not know what derived answers are derived from
            plain = replace(config, band_weight=0.0)
            distilled = answer_weights(data.records, packed.labels, packed.block, plain)
        else:
            distilled = weight
        weight, distilled = ((w * scale).to(labels.device) for w in (weight, distilled))
        logits = self.source.answer_logits(guarded, packed)
        total = (
            config.ce_weight * (F.cross_entropy(logits, labels, reduction="none") * weight).sum()
        )
        if config.kl_weight:
            with torch.no_grad():
                teacher = self.source.answer_logits(taught, packed) / config.temperature
                if config.uncertain_nats:
                    teacher = softened(logits, teacher, config.uncertain_nats)
            total = total + config.kl_weight * (token_kl(logits, teacher) * distilled).sum()
        accuracy = float((logits.argmax(-1) == labels).float().mean()) * answered
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
