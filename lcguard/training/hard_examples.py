"""What a detector learns from attackers: weights of the values that they recovered, budgets of the
categories that they recover most of, and labels that are less certain where it cannot follow.

**Hard examples.** A value that an attacker recovered from the guard's segment weighs more.

**Budgets** (after RobustLT, arXiv 2605.13395). The paper spreads a fixed budget over classes by how
rare each is, ``w_y = (1 - a) + a sqrt(log K_y) / E_P[sqrt(log K_y)]`` with ``K_y = P1 / P_y`` of
the shares P, and weights the size of the perturbation that a class is trained against. The form and
the fixed mean are the paper's. That the weight is of a value's loss, and that K_y is made of the
share of a category's values that attackers did *not* recover, instead of its share among the
values, is ours: it is recovery that is rare where the guard is good.

**Uncertain labels** (after arXiv 2605.21999). The label of a token in a category is a teacher that
is ``SURE`` of it, its two logits ``(0, +-log(SURE / (1 - SURE)))``. Its temperature rises with the
student's distance from it (``uncertain_teacher.softened``), so that the target nears 1/2. The
result is stretched about 1/2 so that at temperature 1 it is the label itself. The rule for the
temperature and the stretch are ours.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcguard.records import TokenRecord, TokenSpan
from lcguard.training.rare_categories import category_weights
from lcguard.training.uncertain_teacher import softened

SURE = 0.99
"""How certain a label is as a teacher. What is quite certain has no finite logits."""


@dataclass(frozen=True)
class Emphasis:
    """What weighs more in a fit. As it is by default nothing does."""

    hard_weight: float = 1.0
    """Of the tokens of a value that attackers recovered."""
    budgets: Mapping[str, float] = field(default_factory=dict)
    """Weight of the values of each category; 1 where none stands."""
    uncertain_nats: float = 0.0
    """Distance of student and label from which on the label is less certain; 0: it always is."""

    def weighted(
        self,
        weight: Tensor,
        records: Sequence[TokenRecord],
        hard: Sequence[Sequence[TokenSpan]],
    ) -> Tensor:
        """``weight [B, T, C]`` with more on the tokens of values, each in its own category;
        ``hard``: of each record the recovered ones."""
        if self.hard_weight == 1 and not self.budgets:
            return weight
        factor = torch.ones_like(weight)
        for row, record, recovered in zip(factor, records, hard, strict=True):
            # where two overlap, the recovered one counts
            for span, c in sorted(record.categorised(), key=lambda one: one[0] in recovered):
                times = self.hard_weight if span in recovered else 1.0
                times *= self.budgets.get(str(span.category), 1.0)
                row[span.start : span.end, c] = times
        return weight * factor

    def target(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the logits ``[B, T, C]`` are fitted to: between label and 1/2. No gradient."""
        if not self.uncertain_nats:
            return labels
        return uncertain_labels(logits, labels, self.uncertain_nats)


NOTHING = Emphasis()


@torch.no_grad()
def uncertain_labels(logits: Tensor, labels: Tensor, nats: float) -> Tensor:
    """Labels ``[...]`` of 0 and 1, nearer to 1/2 where the student's ``logits`` are far from them:
    exact up to a distance of ``nats``."""
    sure = math.log(SURE / (1 - SURE))
    signed = torch.where(labels > 0, sure, -sure).flatten()
    zero = torch.zeros_like(signed)
    student = torch.stack((zero, logits.flatten()), -1)
    found = softened(student, torch.stack((zero, signed), -1), nats)
    # stretched: SURE becomes 1, and what is certain stays so to the last bit
    target = 0.5 + (found[:, 1].sigmoid() - 0.5) / (2 * SURE - 1)
    exact = found[:, 1] == signed
    return torch.where(exact, labels.flatten(), target.clamp(0, 1)).view_as(labels)


def recovery_budgets(
    sources: Sequence[Sequence[TokenRecord]],
    asked: Mapping[str, int],
    recovered: Mapping[str, int],
    strength: float,
) -> dict[str, float]:
    """Weight of each category's values, mean 1 over the values that a fit draws from ``sources``,
    each drawn from as often. ``strength``: a, 0..1; {} for 0.

    A category's ease is the share of its values that no attacker recovered, of ``n`` asked
    ``(n - recovered + 1) / (n + 1)``: never 0, and 1 for one that was not asked about.
    """
    if not strength:
        return {}
    drawn: defaultdict[str, float] = defaultdict(float)
    for records in sources:
        for record in records:
            for span, _ in record.categorised():
                drawn[str(span.category)] += 1 / len(records)
    total = sum(drawn.values())
    shares = {name: n / total for name, n in sorted(drawn.items())}
    ease = {}
    for name in shares:
        n = asked.get(name, 0)
        ease[name] = (n - recovered.get(name, 0) + 1) / (n + 1)
    return category_weights(shares, strength, ease)


def divided(records: Sequence[TokenRecord], parts: int, seed: int) -> list[list[int]]:
    """Where in ``records`` each part's stand: no scenario is in two, none is empty, and they are
    about as large.

    Raises ``ValueError`` where there are fewer scenarios than parts.
    """
    scenarios: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        scenarios.setdefault(record.scenario_id, []).append(i)
    if len(scenarios) < parts:
        raise ValueError(
            f"{len(scenarios)} training scenarios cannot be divided into {parts} parts: load more, "
            f"or set rounds.count to {max(0, len(scenarios) - 1)} or less"
        )
    names = sorted(scenarios)
    random.Random(f"rounds/{seed}").shuffle(names)
    out: list[list[int]] = [[] for _ in range(parts)]
    for name in sorted(names, key=lambda n: -len(scenarios[n])):  # stable: else as shuffled
        min(out, key=len).extend(scenarios[name])
    return [sorted(at) for at in out]
