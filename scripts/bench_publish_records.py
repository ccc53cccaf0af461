"""A publish whose guard looks for the secrets itself, on real records: beside a plain prefill.

python scripts/bench_publish_records.py --model FOLDER --data PATH --out FILE

Such a prompt is computed twice: once to be looked at, and again from the first token that is
hidden. How late that stands depends on the text and the rule, so records are published as they are,
under their own rules and under one that forbids everything. The three are paired: each record, one
after the other in turns that change, on one vLLM engine without prefix caching.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_handoff import opened, timed, worker_store

from lcguard.agents.scenarios.load import load_hops
from lcguard.agents.scenarios.types import Hop
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report

KINDS = ("plain", "vanilla", "guarded")
OWN, ALL = "its own rule", "everything forbidden"


def drawn(args: Any, source: str) -> list[Hop]:
    """Records that hold something which their rule forbids."""
    path = None if source == "generator" else Path(args.data) / source
    hops = load_hops(source, path=path, seed=args.seed, n=500 if path is None else None)
    hops = [h for h in hops if any(s.category in h.edge.rule.forbid for s in h.record.spans)]
    return random.Random(f"{args.seed}/{source}").sample(hops, min(args.records, len(hops)))


def audience(kind: str, forbid: Sequence[str]) -> str:
    return "-".join((kind, *forbid))


def rules(args: Any, hops: Sequence[Hop]) -> dict[str, Any]:
    """An edge for each rule of the records, guarded and not."""
    forbidden = {tuple(h.edge.rule.forbid) for h in hops} | {tuple(CATEGORIES)}
    return {
        "version": 1,
        "edges": [
            {"source": "sender", "audience": audience(kind, f), "forbid": list(f), "guard": guard}
            for f in sorted(forbidden)
            for kind, guard in (("vanilla", "identity"), ("guarded", args.guard))
        ],
    }


def measure(llm: Any, prompts: Sequence[tuple[list[int], Sequence[str]]], args: Any) -> list[Any]:
    """Milliseconds of each kind for each prompt, after three to warm up."""
    from vllm import SamplingParams

    once = SamplingParams(temperature=0, max_tokens=1)
    rng, out = random.Random(args.seed), []
    for ids, forbid in [*prompts[:3], *list(prompts) * args.repeats]:
        row = {}
        for kind in rng.sample(KINDS, 3):
            if kind == "plain":
                row[kind], _ = timed(llm.generate, agent="text", params=once, prompt=ids)
                continue
            to = audience(kind, forbid)
            row[kind], handle = timed(llm.publish, agent="sender", prompt=ids, audience=to)
            worker_store(llm).delete(handle.handle)  # the store's disk is not what is measured
        out.append(row)
    return out[3:]


def summary(source: str, rule: str, tokens: float, raw: Sequence[Any]) -> dict[str, Any]:
    spent = {k: round(statistics.median(r[k] for r in raw), 3) for k in KINDS}
    ratio = {of: round(statistics.median(r["guarded"] / r[of] for r in raw), 4) for of in KINDS[:2]}
    return {
        "source": source,
        "rule": rule,
        "tokens": round(tokens, 1),
        "publish_ms": spent,
        "guarded_over_plain": ratio["plain"],
        "guarded_over_vanilla": ratio["vanilla"],
        "raw_ms": raw,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        model=("nano", "nano, a folder or a hub repository"),
        guard=("twin", "name in the policy"),
        guard_path=("smollm2:twin", "its folder"),
        data=("", "the benchmarks' folder; without it the generator's records alone"),
        records=24,
        repeats=1,
        seed=0,
        dtype="bfloat16",
    )
    args = parser.parse_args(argv)
    if args.records < 1 or args.repeats < 1:
        raise ValueError(f"--records {args.records} --repeats {args.repeats}: use 1 or more")
    sources = ["generator", *(("agentleak", "privacylens", "magpie") if args.data else ())]
    hops = {source: drawn(args, source) for source in sources}
    rows = []
    every = [hop for found in hops.values() for hop in found]
    with opened(args, 2048, cache_gib=2, rules=rules(args, every)) as (llm, _):
        encode = llm.engine.get_tokenizer().encode
        for source, found in hops.items():
            ids = [encode(hop.record.text)[:2000] for hop in found]
            mean = statistics.mean(map(len, ids))
            own = [tuple(hop.edge.rule.forbid) for hop in found]
            for rule, forbids in ((OWN, own), (ALL, [CATEGORIES] * len(ids))):
                raw = measure(llm, list(zip(ids, forbids, strict=True)), args)
                rows.append(summary(source, rule, mean, raw))
                print({k: v for k, v in rows[-1].items() if k != "raw_ms"})
    command = "python scripts/bench_publish_records.py --model FOLDER"
    command += " --data PATH" if args.data else ""
    command += f" --records {args.records} --repeats {args.repeats} --dtype {args.dtype}"
    found_all = {"unit": "ms", "model": Path(args.model).name, "guard": args.guard, "rows": rows}
    write_report(args, "A publish whose guard looks for the secrets", command, found_all)
    return 0


if __name__ == "__main__":
    run_script(main)
