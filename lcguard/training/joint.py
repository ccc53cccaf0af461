"""All segments of a path or graph together, as one attacker sees them: ``M_obs``.

Full-System training (arXiv 2605.22786) and the composition attack both read segments behind each
other; a token's ``segment`` says which one it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lcguard.protocols import AttackData, Guard, KVBatch, Mask
from lcguard.records import IGNORE, TokenRecord, pad
from lcguard.source import ModelSource
from lcguard.tokens import Special
from lcguard.training.dataset import attack_data, guard_all


def join_data(
    parts: Sequence[AttackData], names: Sequence[str], record_ids: Sequence[str] | None = None
) -> AttackData:
    """Row by row, the parts' segments behind each other with the secrets of all.

    Fields become ``name.field``; positions count from the start of the joint segment;
    ``segments`` ``[B, T]`` says which part a token is of. Differentiable in the KV.
    """
    n = len(parts[0])
    kv = KVBatch.join([p.kv for p in parts])
    lengths = torch.stack([p.kv.valid.sum(1).cpu() for p in parts], 1)  # [B, P]
    starts = lengths.cumsum(1) - lengths
    secrets, ids, prompts, owners = [], [], [], []
    for i in range(n):
        row, known, asked, owner = [], [], [], []
        for k, (part, name) in enumerate(zip(parts, names, strict=True)):
            shift, width = int(starts[i, k]), int(lengths[i, k])
            row += [
                replace(
                    s,
                    field=f"{name}.{s.field}",
                    positions=(s.positions[0] + shift, s.positions[1] + shift),
                )
                for s in part.secrets[i]
            ]
            own = part.context_ids[i, :width].tolist()
            known += own + [IGNORE] * (width - len(own))
            asked += list(part.prompts[i])
            owner += [k] * width
        secrets.append(row)
        ids.append(known)
        prompts.append(asked)
        owners.append(owner)
    first = parts[0]
    mask = Mask(
        *(torch.stack([getattr(p.mask, w) for p in parts]).any(0) for w in ("forbid", "derive"))
    )
    return replace(
        first,
        kv=kv,
        context_ids=pad(ids, IGNORE),
        secrets=secrets,
        record_ids=list(first.record_ids if record_ids is None else record_ids),
        mask=mask,
        prompts=prompts,
        records=None,
        segments=pad(owners, 0),
        parts=len(parts),
    )


def observed(
    records: Sequence[TokenRecord], kv: KVBatch, special: Special, hops: int
) -> AttackData:
    """Attack pairs of a training batch: segments on their own, or whole paths where ``hops`` > 1.

    The batch holds hop after hop, as ``steps.Steps`` makes it.
    """
    if hops == 1:
        return attack_data(records, kv, special)
    n = len(records) // hops
    parts = [
        attack_data(records[k * n : (k + 1) * n], kv[k * n : (k + 1) * n].trim(), special)
        for k in range(hops)
    ]
    return join_data(parts, [f"hop{k + 1}" for k in range(hops)])


def guarded_path(
    guard: Guard,
    hops: Sequence[Sequence[TokenRecord]],
    source: ModelSource,
    special: Special,
    seed: int = 0,
) -> list[KVBatch]:
    """Each hop's guarded segments, made on top of those of the hop before, row by row."""
    out: list[KVBatch] = []
    for k, records in enumerate(hops):
        on = out[-1] if out else None
        raw = source.prefill([r.ids for r in records], on=on)
        out.append(guard_all(guard, records, raw, source, special, seed=seed + k))
    return out
