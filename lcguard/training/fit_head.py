"""Fits the head of a category of a policy's own (``guards.token_head``) on examples, and measures
it.

Every figure is of values that the head which found them was not fitted on. The examples are dealt
into folds, all texts in which one value stands into the same; each is read by a head fitted on the
other folds, and its threshold, too, was chosen on those. What is kept is fitted on all of them,
with the threshold of all folds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lcguard.guards.token_head import TokenHead, belonging
from lcguard.training.descent import Descent
from lcguard.value_search import Range


@dataclass(frozen=True)
class HeadConfig:
    steps: int = 250
    batch: int = 15
    lr: float = 2e-3
    warmup: int = 20
    width: int = 64
    dropout: float = 0.3
    """Share of the features that a text of a step does without."""
    value_weight: float = 3.0
    """Of a value's tokens against others."""
    swaps: int = 2
    """How often each text is read again with values of other texts in its values' places."""
    folds: int = 5
    target_recall: float = 0.95
    """Share of values that were not learnt from, for which the threshold is chosen."""
    seed: int = 0


@dataclass(frozen=True)
class HeadText:
    """A text, or a piece of one, as a head reads it."""

    features: Tensor
    """``[T, F]``"""
    values: tuple[Range, ...]
    """Token ranges that have to be found; none where the text is read for learning alone."""
    belongs: Tensor
    """``[T]`` bool: of a value."""
    counts: Tensor
    """``[T]`` bool: known to be of one or of none."""
    groups: frozenset[int]
    """Values, by number, of which something is in the text: it is learnt from where all are."""


class Cut(NamedTuple):
    """Above ``threshold`` a token belongs to a value, of which one reaches ``peak``."""

    threshold: float
    peak: float


@dataclass(frozen=True)
class FittedHead:
    head: TokenHead
    cut: Cut
    found: int
    total: int
    examples_flagged: float
    negatives_flagged: float


class _Read(NamedTuple):
    """A text with the logits of a head that did not learn from it."""

    text: HeadText
    logits: Tensor


def fit_and_measure(
    examples: Sequence[HeadText],
    swapped: Sequence[HeadText],
    negatives: Sequence[HeadText],
    config: HeadConfig,
    progress: Callable[[], None] = lambda: None,
) -> FittedHead:
    """Fits ``config.folds`` heads to measure with, and the one that is kept.

    Args:
        swapped: examples with other values, to learn from; never measured.
        negatives: texts without the category; each fold measures its share of them.
        progress: called after each step.

    Raises ``ValueError`` for examples that cannot be dealt into folds, all of one value.
    """
    fold_of = _folds(examples, config)
    folds: list[list[_Read]] = []
    for k in range(config.folds):
        learnt = {g for g, fold in fold_of.items() if fold != k}
        others = [n for i, n in enumerate(negatives) if i % config.folds != k]
        texts = [t for t in (*examples, *swapped) if t.groups <= learnt]
        head = fit_head(texts, others, config, progress)
        held = [t for t in examples if not t.groups <= learnt]
        held += [n for i, n in enumerate(negatives) if i % config.folds == k]
        folds.append([_Read(t, _logits(head, t)) for t in held])
    found = total = 0
    flags: dict[bool, list[Tensor]] = {True: [], False: []}
    for k, fold in enumerate(folds):
        cut = choose_cut([r for i, f in enumerate(folds) if i != k for r in f], config)
        for text, logits in fold:
            marks = _marks(logits, cut)
            total += len(text.values)
            found += sum(bool(marks[a:b].all()) for a, b in text.values)
            flags[bool(text.groups)].append(marks[text.counts & ~text.belongs])
    head = fit_head([*examples, *swapped], negatives, config, progress)
    cut = choose_cut([r for fold in folds for r in fold], config)
    return FittedHead(head, cut, found, total, _share(flags[True]), _share(flags[False]))


def _folds(examples: Sequence[HeadText], config: HeadConfig) -> dict[int, int]:
    """Fold of each group; those that meet in a text are dealt together."""
    joined: dict[int, int] = {}

    def root(g: int) -> int:
        joined.setdefault(g, g)
        while joined[g] != g:
            g = joined[g]
        return g

    for text in examples:
        first, *rest = sorted(text.groups)
        for g in (first, *rest):
            joined[root(g)] = root(first)
    weight: dict[int, int] = {}
    for text in examples:
        at = root(min(text.groups))
        weight[at] = weight.get(at, 0) + len(text.values)
    if sum(w > 0 for w in weight.values()) < config.folds:
        raise ValueError(
            f"the examples' values fall into fewer than {config.folds} parts that no text joins: "
            "give texts with other values"
        )
    order = list(weight)
    random.Random(f"folds/{config.seed}").shuffle(order)
    order.sort(key=lambda g: -weight[g])
    load, of_root = [0.0] * config.folds, dict[int, int]()
    for g in order:
        k = min(range(config.folds), key=load.__getitem__)
        of_root[g] = k
        load[k] += weight[g] + 0.1
    return {g: of_root[root(g)] for g in joined}


def fit_head(
    texts: Sequence[HeadText],
    negatives: Sequence[HeadText],
    config: HeadConfig,
    progress: Callable[[], None] = lambda: None,
) -> TokenHead:
    """A head fitted on texts, every fifth of a step one without the category."""
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    head = TokenHead(texts[0].features.shape[1], config.width, config.dropout)
    descent = Descent(head.parameters(), config.steps, config.lr, config.warmup, weight_decay=0.05)
    head.train()
    for step in range(config.steps):
        other = config.batch // 5 if negatives else 0
        rows = [rng.choice(texts) for _ in range(config.batch - other)]
        rows += [rng.choice(negatives) for _ in range(other)]
        longest = max(len(r.features) for r in rows)
        x = torch.zeros(len(rows), longest, rows[0].features.shape[1])
        y, counts = torch.zeros(2, len(rows), longest)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            n = len(row.features)
            x[i, :n], y[i, :n] = row.features.float(), row.belongs.float()
            counts[i, :n], valid[i, :n] = row.counts.float(), True
        weight = counts * torch.where(y > 0, config.value_weight, 1.0)
        logits = head(x, valid)
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none") * weight
        descent.down(step, each[valid].mean())
        progress()
    return head.eval()


def choose_cut(read: Sequence[_Read], config: HeadConfig) -> Cut:
    """Of all that find ``target_recall`` of the values, the one that flags the fewest others."""
    values = [
        (float(logits[a:b].min()), float(logits[a:b].max()))
        for text, logits in read
        for a, b in text.values
    ]
    needed = -int(-config.target_recall * len(values) // 1)
    best, fewest = Cut(0.0, 0.0), float("inf")
    lows = sorted({low for low, _ in values}, reverse=True)
    candidates = [low for low in lows if sum(v >= low for v, _ in values) >= needed][:20]
    for low in candidates:
        highs = sorted((high for v, high in values if v >= low), reverse=True)
        cut = Cut(low - 1e-4, highs[needed - 1] - 1e-4)
        flagged = sum(
            int(_marks(logits, cut)[text.counts & ~text.belongs].sum()) for text, logits in read
        )
        if flagged < fewest:
            best, fewest = cut, flagged
    return best


@torch.no_grad()
def _logits(head: TokenHead, text: HeadText) -> Tensor:
    valid = torch.ones(1, len(text.features), dtype=torch.bool)
    logits: Tensor = head(text.features.float()[None], valid)[0]
    return logits


def _marks(logits: Tensor, cut: Cut) -> Tensor:
    valid = torch.ones(1, len(logits), dtype=torch.bool)
    return belonging(logits[None], valid, cut.threshold, cut.peak)[0]


def _share(flags: Iterable[Tensor]) -> float:
    found = torch.cat([torch.zeros(0, dtype=torch.bool), *flags])
    return float(found.float().mean()) if len(found) else 0.0
