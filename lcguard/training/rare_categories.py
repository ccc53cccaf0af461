"""Weights for rare categories of secrets, on a budget (after RobustLT, arXiv 2605.13395).

A loss that is a mean over secrets is made by the frequent categories. With P the share of each
category among the training secrets, P1 the largest, and K_y = P1 / P_y,

    w_y = (1 - a) + a sqrt(log K_y) / E_P[sqrt(log K_y)],

so that the mean weight over secrets is 1 whatever a is: what rare ones gain frequent ones give. a
grows from 0 over a warm-up, min((t - 1) / (b T), 1) of it in step t of T. The paper weights the
size of the perturbation that each class is trained against; here it is the leak's weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lcguard.records import TokenRecord
from lcguard.training.twins import forbidden_spans


def category_shares(records: Sequence[TokenRecord]) -> dict[str, float]:
    """P: how often each category comes among the values of the records."""
    counts = Counter(str(s.category) for r in records for s, _ in r.categorised())
    return {name: n / counts.total() for name, n in sorted(counts.items())}


def category_weights(
    shares: Mapping[str, float], strength: float, ease: Mapping[str, float] | None = None
) -> dict[str, float]:
    """w of each category; ``strength`` is a. All 1 where all are as frequent.

    ``ease``: above 0, takes the place of P in K_y where something else than frequency says what
    is hard; the mean stays that over P.
    """
    if not shares:
        return {}
    ease = shares if ease is None else {name: ease[name] for name in shares}
    largest = max(ease.values())
    root = {name: math.sqrt(math.log(largest / p)) for name, p in ease.items()}
    mean = sum(shares[name] * root[name] for name in shares)
    if mean == 0:
        return dict.fromkeys(shares, 1.0)
    return {name: (1 - strength) + strength * root[name] / mean for name in shares}


def warmed(strength: float, step: int, steps: int, warmup: float) -> float:
    """a in a step, counted from 0; ``warmup`` is b, 0 for all of it at once."""
    return strength * min(1.0, step / (warmup * steps)) if warmup * steps else strength


def record_weights(records: Sequence[TokenRecord], weights: Mapping[str, float]) -> Tensor:
    """``[B]``: the mean weight of each record's forbidden values; 1 where it has none."""
    out = []
    for record in records:
        own = [weights.get(str(s.category), 1.0) for s in forbidden_spans(record, record.forbid)]
        out.append(sum(own) / len(own) if own else 1.0)
    return torch.tensor(out)
