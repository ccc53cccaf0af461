"""What a run starts from: records held back, the guard's statistics, and directions of traces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.guards.base import GuardModule
from lcguard.protocols import AttackData
from lcguard.records import TokenRecord
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.config import TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.joint import observed
from lcguard.training.secret_traces import root, shape_noise, trace_covariance
from lcguard.training.twins import ValuePool

_SAMPLE = 384
"""Records that statistics are taken of."""


def split_held(
    records: Sequence[TokenRecord], config: TrainConfig
) -> tuple[list[TokenRecord], list[TokenRecord]]:
    """Records to train on and, for ``rollback_every``, the last two batches, held back.

    Raises ``ValueError`` where too few are left.
    """
    n = 2 * config.batch if config.rollback_every else 0
    if n and len(records) < 2 * n:
        raise ValueError(
            f"rollback_every holds back {n} records of {len(records)}: give {2 * n} or more, or "
            "set it to 0"
        )
    return list(records[: len(records) - n]), list(records[len(records) - n :])


def prepare(
    module: GuardModule,
    records: Sequence[TokenRecord],
    source: ModelSource,
    special: Special,
    pool: ValuePool,
    hops: int = 1,
) -> AttackData:
    """Fits the guard's statistics; returns raw pairs (paths of ``hops``), everything forbidden."""
    sample = with_policy(records[:_SAMPLE], CATEGORIES)
    raw = source.prefill([r.ids for r in sample])
    module.fit_statistics(raw)
    start = getattr(module, "start_codebook", None)
    if start is not None:
        # placeholder KV: constants that the receiver reads as "a token, but no value"
        words = int(module.config.words)
        fill = source.prefill([(special.neutral_id,) * (w + 4) for w in range(words)])
        z = module.standardise(fill)
        book = torch.stack([z[w, 3 + w] for w in range(words)])
        start(band_means(module.standardise(raw), sample, pool, book))
    whole = len(sample) // hops * hops
    return observed(sample[:whole], raw[:whole], special, hops)


def band_means(z: Tensor, records: Sequence[TokenRecord], pool: ValuePool, book: Tensor) -> Tensor:
    """The codebook ``[W, L, 2, H * D]`` with the words that stand for bands at the mean of the
    values of their band: a receiver reads something of the band from it before any training."""
    found: dict[int, list[Tensor]] = {}
    for i, record in enumerate(records):
        for span, _ in record.categorised():
            word = pool.word(span, len(book))
            if word is not None:
                found.setdefault(word, []).append(z[i, span.start : span.end])
    book = book.clone()
    for word, values in found.items():
        book[word] = torch.cat(values).mean(0)
    return book


def traces_of(
    module: GuardModule,
    records: Sequence[TokenRecord],
    source: ModelSource,
    pool: ValuePool,
    config: TrainConfig,
) -> Tensor | None:
    """``secret_traces.root`` where a setting asks for it; starts the guard's maps by it, too."""
    if not (config.trace_weight or config.trace_noise):
        return None
    found = trace_covariance(module, records[:_SAMPLE], pool, source, config.seed)
    factor = root(found, config.trace_directions)
    if config.trace_noise:
        shape_noise(module, factor, config.trace_noise)
    return factor
