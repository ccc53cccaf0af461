"""Contexts shown token by token: which ones, and how much of each token the guard withheld.

A context of which everything is forbidden shows a guard no more than one of which nothing is.
Those shown are therefore the ones that a policy divides: some values forbidden, others not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lcguard.categories import CATEGORIES
from lcguard.evaluation.plan import PolicySpec
from lcguard.evaluation.runner import EDGE
from lcguard.evaluation.schedule import HopRun
from lcguard.evaluation.segments import VICTIM
from lcguard.guards.frozen import FrozenGuard
from lcguard.protocols import Mask
from lcguard.records import TokenRecord, masks
from lcguard.training.dataset import with_policy


def explain(run: HopRun) -> list[dict[str, Any]]:
    """Contexts with the share of each token that the policy guard withheld."""
    plan, model = run.plan, run.runner.s.model
    spec = next((g for g in plan.guards if g.name == plan.policy_guard), None)
    if spec is None:
        return []
    guard, out = run.runner.s.guards[spec.name], []
    for name, record in chosen(run.hops.sides[VICTIM], plan.policies, plan.explain):
        out.append(
            {
                "title": record.record_id,
                "guard": guard.name,
                "policy": name,
                "tokens": explain_tokens(
                    guard,
                    record,
                    model.source.prefill([record.ids]),
                    masks([record]),
                    model.decode,
                ),
            }
        )
    return out


def chosen(
    records: Sequence[TokenRecord], policies: Sequence[PolicySpec], n: int
) -> list[tuple[str, TokenRecord]]:
    """``n`` records at most, each under a policy by name: those that divide one in turn, each on
    the record that it divides best; where none divides any, the first records under the last."""
    views = {EDGE: list(records)}
    views |= {p.name: with_policy(records, p.forbid, p.derive) for p in policies}
    ranked = {
        name: iter(sorted((r for r in found if _divided(r)), key=_divided, reverse=True))
        for name, found in views.items()
    }
    out: list[tuple[str, TokenRecord]] = []
    while len(out) < n and ranked:
        for name in list(ranked):
            record = _unused(ranked[name], {r.record_id for _, r in out})
            if record is None:
                del ranked[name]
            elif len(out) < n:
                out.append((name, record))
    last = policies[-1].name if policies else EDGE
    return out or [(last, r) for r in views[last][:n]]


def _unused(records: Iterator[TokenRecord], shown: set[str]) -> TokenRecord | None:
    return next((r for r in records if r.record_id not in shown), None)


def _divided(record: TokenRecord) -> int:
    """Values that are forbidden, or that pass, whichever are fewer; none where every category is
    forbidden: then little of the rest stays either, whoever it belongs to."""
    if set(CATEGORIES) <= set(record.forbid):
        return 0
    secret = sum(s.secret for s in record.spans)
    return min(secret, len(record.spans) - secret)


def explain_tokens(
    guard: FrozenGuard,
    record: TokenRecord,
    kv: Any,
    mask: Mask,
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """Token texts with the share withheld and the category of the value they belong to."""
    marks = guard.marks(kv, mask)
    if marks is not None:
        withheld = (marks[0, : len(record.ids)] >= 0).float()
    elif guard.needs_twin:
        withheld = torch.zeros(len(record.ids))
        for s in record.spans:
            withheld[s.start : s.end] = float(s.secret)
    else:
        withheld = guard(kv, mask).withheld[0].cpu()
    category = {i: s.category for s in record.spans for i in range(s.start, s.end)}
    return [
        {"text": decode([t]), "withheld": round(float(withheld[i]), 4), "category": category.get(i)}
        for i, t in enumerate(record.ids)
    ]
