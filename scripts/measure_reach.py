"""What a guard loses by seeing some tokens to either side instead of the whole segment.

Held-out records, one a segment, and eight records' KV behind each other as one segment, of which
each record's part is then asked alone. Everything is forbidden.

python scripts/measure_reach.py --out benchmarks/results/reach.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.guards.frozen import FrozenGuard
from lcguard.noise import noise_key
from lcguard.protocols import KVBatch
from lcguard.records import mask_of, value_labels
from lcguard.rule import Rule
from lcguard.tokens import TokenRecord

REACHES = (0, 256, 128, 64)
CLOSED = 0.5


def measure(
    backend: HFBackend, guard: FrozenGuard, records: Sequence[TokenRecord], size: int
) -> list[dict[str, Any]]:
    """A row for each reach, of segments that hold ``size`` records."""
    raw = [backend.source.prefill([r.ids]) for r in records]
    groups = [range(i, i + size) for i in range(0, len(records), size)]
    module, mask = guard.module, mask_of([Rule(CATEGORIES)])
    values = torch.cat(
        [value_labels([r], kv.valid)[0].any(1) for r, kv in zip(records, raw, strict=True)]
    )
    rows, before = [], torch.empty(0)
    for reach in REACHES:
        context: Any = module.context
        context.reach = reach
        closed: list[Tensor] = []
        answered: list[KVBatch] = []
        for index, group in enumerate(groups):
            segment = KVBatch.join([raw[i] for i in group])
            keys = [noise_key(0, f"{size}/{index}")]  # the same noise for every reach
            out = guard(segment, mask, keys=keys)
            closed.append(out.withheld[0])
            start = 0
            for i in group:
                end = start + len(records[i].ids)
                part = (x[:, :, :, start:end] for x in (out.kv.keys, out.kv.values))
                answered.append(KVBatch(*part, out.kv.valid[:, start:end]))
                start = end
        share = torch.cat(closed)
        before = before if len(before) else share
        kv = KVBatch.stack(answered)
        right = backend.source.exact_match(records, kv, lambda r, q: q.task)
        asked = [one for row in right for one in row]
        rows.append(
            {
                "records_in_segment": size,
                "reach_tokens": reach,
                "longest_tokens": max(sum(len(records[i].ids) for i in g) for g in groups),
                "task_right": round(sum(asked) / len(asked), 4),
                "asked": len(asked),
                "value_tokens_withheld": round(float(share[values].mean()), 4),
                "other_tokens_withheld": round(float(share[~values].mean()), 4),
                "value_tokens_open": int((share[values] < CLOSED).sum()),
                "value_tokens": int(values.sum()),
                "most_moved": round(float((share - before).abs().max()), 4),
            }
        )
        print(rows[-1])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__, guard=("nano:gate", "of the nano agent"), records=80, together=8, seed=0
    )
    args = parser.parse_args(argv)
    if args.records % args.together:
        raise ValueError(f"--records {args.records} is no multiple of --together {args.together}")
    backend = load_backend("nano")
    hops = load_hops("generator", seed=args.seed, split="coined", n=args.records)
    records = backend.encoder.encode(hops)[: args.records]
    guard = FrozenGuard.from_pretrained(args.guard)
    rows = [r for n in (1, args.together) for r in measure(backend, guard, records, n)]
    command = f"python scripts/measure_reach.py --guard {args.guard} --records {args.records}"
    found = {"guard": args.guard, "rows": rows}
    write_report(args, "What a guard loses by seeing some tokens alone", command, found)
    return 0


if __name__ == "__main__":
    run_script(main)
