"""Attackers inside the training loop: the minimax of arXiv 2605.22786, with options it lacks.

The guard maximises the attackers' cross-entropy (``ce``), pulls their prediction to the prior of
the field (``kl_prior``), or the probability of the true token there by least squares
(``least_squares``, after LSGAN, arXiv 1611.04076): what is hidden already pulls no further, and a
confident attacker leaves a gradient that is bounded. Several attackers, resets and lag are options.
What these attackers recover in the end is *not* a privacy figure: fresh attackers are the judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcguard.protocols import AttackData
from lcguard.records import IGNORE
from lcguard.training.config import AdversaryConfig


class Adversary(Protocol):
    """An attack that can be trained step by step and differentiated through."""

    fields: dict[str, int]

    @property
    def network(self) -> nn.Module: ...

    def start(self, pairs: AttackData, *, seed: int = 0) -> None: ...

    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    def update(self, batch: AttackData, optimizers: Sequence[torch.optim.Optimizer]) -> float: ...

    def loss(self, batch: AttackData, *, auxiliary: bool = True) -> Tensor: ...

    def log_probs(self, batch: AttackData) -> tuple[Tensor, Tensor, Tensor]: ...


AdversaryFactory = Callable[[dict[str, Any]], Adversary]


class Ensemble:
    """The attackers of one training run."""

    def __init__(
        self, config: AdversaryConfig, factory: AdversaryFactory, pairs: AttackData, seed: int
    ) -> None:
        self.config, self._pairs, self._seed = config, pairs, seed
        self.members: list[Adversary] = [factory(config.options) for _ in range(config.count)]
        for i, member in enumerate(self.members):
            member.start(pairs, seed=seed + i)
        self._owned = [m.optimizers() for m in self.members]
        self.prior = FieldPrior(pairs, self.members[0].fields) if self.members else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All members' optimisers, in order: their state belongs in a checkpoint."""
        return [o for owned in self._owned for o in owned]

    def modules(self) -> dict[str, nn.Module]:
        return {f"adversary{i}": m.network for i, m in enumerate(self.members)}

    def guard_term(self, batch: AttackData) -> Tensor:
        """What the guard adds to its loss: smaller is better hidden."""
        total = batch.kv.keys.new_zeros((), dtype=torch.float32)
        for member in self.members:
            if self.config.objective == "ce":
                total = total - member.loss(batch, auxiliary=False)
            elif self.prior is not None:
                apart = (
                    self.prior.divergence
                    if self.config.objective == "kl_prior"
                    else self.prior.squares
                )
                total = total + apart(*member.log_probs(batch))
        return self.config.weight * total / max(1, len(self.members))

    def learn(self, batch: AttackData, step: int) -> dict[str, float]:
        """The attackers' own steps on the current (or, with lag, a stale) guard's output."""
        c = self.config
        if not self.members:
            return {}
        if c.reset_every and step and step % c.reset_every == 0:
            which = (step // c.reset_every) % len(self.members)
            self.members[which].start(self._pairs, seed=self._seed + 1000 + step)
            self._owned[which] = self.members[which].optimizers()
        if step % c.lag:  # after the reset, or a lag would skip some attackers' resets for good
            return {}
        loss = 0.0
        for member, optimizers in zip(self.members, self._owned, strict=True):
            for _ in range(c.steps_per_guard_step):
                loss += member.update(batch, optimizers) / len(self.members)
        return {"attacker_nats": loss / c.steps_per_guard_step}


class FieldPrior:
    """Token distribution of each field at each step of the value, with add-one smoothing."""

    def __init__(self, pairs: AttackData, fields: dict[str, int], steps: int = 8) -> None:
        vocab, end = pairs.special.vocab, pairs.special.end_id
        counts: dict[tuple[int, int], Counter[int]] = {}
        for secrets in pairs.secrets:
            for s in secrets:
                for k, token in enumerate((*s.ids, end)):
                    key = fields.get(s.field, len(fields)), min(k, steps - 1)
                    counts.setdefault(key, Counter())[token] += 1
        self.steps = steps
        self.table = torch.full((len(fields) + 1, steps, vocab), 1.0 / vocab)
        for (field, k), counter in counts.items():
            for token, n in counter.items():
                self.table[field, k, token] += n
        self.table /= self.table.sum(-1, keepdim=True)

    def divergence(self, fields: Tensor, labels: Tensor, logp: Tensor) -> Tensor:
        """Mean KL(prior || attacker) in nats over the tokens that are due."""
        prior, due = self._prior(fields, labels), labels != IGNORE
        kl = (prior * (prior.clamp_min(1e-12).log() - logp)).sum(-1)
        return kl[due].mean() if bool(due.any()) else logp.sum() * 0.0

    def squares(self, fields: Tensor, labels: Tensor, logp: Tensor) -> Tensor:
        """Mean squared distance of the true token's probability from the prior's, over the tokens
        that are due."""
        prior, due = self._prior(fields, labels), labels != IGNORE
        true = labels.masked_fill(~due, 0)[..., None]
        gap = (logp.gather(-1, true).exp() - prior.gather(-1, true)).squeeze(-1).square()
        return gap[due].mean() if bool(due.any()) else logp.sum() * 0.0

    def _prior(self, fields: Tensor, labels: Tensor) -> Tensor:
        """``[N, K, V]``."""
        self.table = self.table.to(labels.device)
        at = torch.arange(labels.shape[1], device=labels.device).clamp_max(self.steps - 1)
        return self.table[fields[:, None], at[None]]
