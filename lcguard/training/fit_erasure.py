"""Fits a linear eraser on records: which category does each token of the context belong to?

The label of a token is the category of the value it is part of; with ``values`` options, its most
frequent tokens are concepts of their own, so that they are hidden from linear readers too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule
from lcguard.guards.concepts import ConceptFitter
from lcguard.guards.erasure import ErasureGuard
from lcguard.records import TokenRecord
from lcguard.source import ModelSource


def frequent_tokens(records: Sequence[TokenRecord], values: int) -> list[dict[int, int]]:
    """For every category its most frequent value tokens, each with its number from 1 on."""
    counts = [Counter[int]() for _ in CATEGORIES]
    for record in records:
        for span, c in record.categorised():
            counts[c].update(record.ids[span.start : span.end])
    # ties by token id: the order of a Counter would be that of the records
    top = [sorted(c.items(), key=lambda item: (-item[1], item[0]))[:values] for c in counts]
    return [{token: i for i, (token, _) in enumerate(row, 1)} for row in top]


def concept_labels(
    records: Sequence[TokenRecord], tokens: Sequence[dict[int, int]], values: int
) -> Tensor:
    """Concepts ``[B, T]`` of every token, right-padded; -1 outside of values."""
    labels = torch.full((len(records), max(len(r.ids) for r in records)), -1)
    for i, record in enumerate(records):
        for span, c in record.categorised():
            for at in range(span.start, span.end):
                labels[i, at] = c * (1 + values) + tokens[c].get(record.ids[at], 0)
    return labels


def fit_erasure(
    module: GuardModule, records: Sequence[TokenRecord], source: ModelSource, batch: int = 64
) -> None:
    """Fits every eraser in ``module``: itself, or parts of a composed guard.

    Concepts are those of raw KV, so an eraser stands before parts that change KV other than by
    noise. Raises ``ValueError`` for a module without eraser or records without categories.
    """
    erasers = [m for m in module.modules() if isinstance(m, ErasureGuard)]
    if not erasers:
        raise ValueError(f"guard {module.name!r} has no eraser to fit: give 'erasure'")
    tokens = [frequent_tokens(records, e.config.values) for e in erasers]
    fitters = [ConceptFitter(e.n_concepts) for e in erasers]
    for first in range(0, len(records), batch):
        part = records[first : first + batch]
        kv = source.prefill([r.ids for r in part])
        for eraser, fitter, known in zip(erasers, fitters, tokens, strict=True):
            labels = concept_labels(part, known, eraser.config.values).to(kv.valid.device)
            fitter.update(eraser.channels(kv)[kv.valid], labels[kv.valid])
    for eraser, fitter in zip(erasers, fitters, strict=True):
        eraser.load_concepts(fitter.solve())
