"""How much a detector finds and what it damages: whole values of forbidden categories against
whatever else it touches, with an exact bound on what it misses.

A value is found where every one of its tokens is hidden. The bound is Clopper and Pearson's,
one-sided: at its level, no more than that share of values like the measured ones is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcguard.protocols import Guard, KVBatch
from lcguard.records import TokenRecord, masks
from lcguard.value_search import Range

LEVEL = 0.95
BATCH = 16
"""Records that a detector reads at once."""


@dataclass
class Tally:
    """Counts over one category, or all."""

    found: int = 0
    total: int = 0

    @property
    def recall(self) -> float | None:
        return self.found / self.total if self.total else None

    def to_dict(self, level: float = LEVEL) -> dict[str, Any]:
        return {
            "found": self.found,
            "total": self.total,
            "recall": self.recall,
            "recall_lower": recall_lower(self.found, self.total, level),
        }


def recall_lower(found: int, total: int, level: float = LEVEL) -> float:
    """One-sided Clopper-Pearson lower bound on the share of values found; 0 where none was asked.

    Raises ``ValueError`` for counts that are no counts.
    """
    from scipy.stats import beta  # half a second that most commands do not need

    if not 0 <= found <= total:
        raise ValueError(f"found={found} of total={total}: give 0 <= found <= total")
    return float(beta.ppf(1 - level, found, total - found + 1)) if found else 0.0


def asr_ceiling(found: int, total: int, blind_guess: float, level: float = LEVEL) -> float:
    """No attacker recovers a value like those measured more often than this: a value that is missed
    stands in clear, one that is found can only be guessed.

    ``(1 - recall) + recall p0`` at the recall's lower bound; p0 is the best blind guess.
    """
    low = recall_lower(found, total, level)
    return (1 - low) + low * blind_guess


def hidden_tokens(guard: Guard, kv: KVBatch, records: Sequence[TokenRecord]) -> list[Tensor] | None:
    """What a guard's detector marks in the raw KV of records under their own policies: one bool
    tensor ``[T]`` a record; None for a guard that is told what to hide, or hides all alike."""
    mask, out = masks(records), list[Tensor]()
    for first in range(0, len(records), BATCH):
        part = slice(first, first + BATCH)
        marks = guard.marks(kv[part].trim(), mask[part])
        if marks is None:
            return None
        out += [m[: len(r.ids)] >= 0 for m, r in zip(marks.cpu(), records[part], strict=True)]
    return out


def overlapping(offsets: Sequence[Range], found: Sequence[Range]) -> Tensor:
    """Which tokens, told by their characters ``[start, end)``, have a part in any of the ranges:
    ``[T]`` bool."""
    out = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in found:
        for i, (a, b) in enumerate(offsets):
            out[i] |= a < end and b > start
    return out


def measure(
    records: Sequence[TokenRecord], marks: Sequence[Tensor], level: float = LEVEL
) -> dict[str, Any]:
    """Figures of a detector on records under their own policies.

    ``marks``: one bool tensor ``[T]`` a record, which tokens are hidden.
    ``task_touched`` is the share of values without a category of which any token is hidden,
    ``tokens_flagged`` the share of all tokens that are. None where there is nothing to divide by.
    """
    whole, by_category = Tally(), dict[str, Tally]()
    touched = task = flagged = tokens = 0
    for record, row in zip(records, marks, strict=True):
        for span in record.spans:
            hidden = row[span.start : span.end]
            if span.secret and span.category is not None:
                for tally in (whole, by_category.setdefault(span.category, Tally())):
                    tally.total += 1
                    tally.found += bool(hidden.all())
            elif span.category is None:
                task += 1
                touched += bool(hidden.any())
        flagged += int(row.sum())
        tokens += len(row)
    return {
        **whole.to_dict(level),
        "level": level,
        "task_spans": task,
        "task_touched": touched / task if task else None,
        "tokens_flagged": flagged / tokens if tokens else None,
        "categories": {c: t.to_dict(level) for c, t in sorted(by_category.items())},
    }
