"""What the guard adds to a publish: milliseconds, and memory beside the segment.

python scripts/bench_publish.py --tokens 4096 --out benchmarks/results/publish.json

A vanilla publish (guard ``identity``), a guarded one and a copy of the segment's bytes, the floor,
are paired: the same contexts, one after the other in turns that change, on one vLLM engine on the
CPU without prefix caching. ``--synthetic TOKENSxLAYERS`` adds segments of random KV at Qwen3-8B's
other sizes (8 KV heads of 128, bfloat16), without an engine, for what memory they take.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_handoff import medians, opened, timed, worker_store
from publish_memory import measure, peak_bytes

from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.guards.base import KVShape

KINDS = ("vanilla", "guarded")
WARM_UP = 2


def publishes(llm: Any, n_tokens: int, repeats: int, vocab: int, seed: int) -> dict[str, Any]:
    """Raw timings in milliseconds for contexts of ``n_tokens``: of whole publishes and of the copy,
    and processor time of what the worker does between prefill and store."""
    rng = random.Random(f"{seed}/{n_tokens}")
    wall: dict[str, list[float]] = {k: [] for k in (*KINDS, "copy")}
    processor: dict[str, list[float]] = {k: [] for k in KINDS}
    for repetition in range(repeats + WARM_UP):
        context = [rng.randrange(64, vocab) for _ in range(n_tokens)]
        for kind in rng.sample((*KINDS, "copy"), 3):
            if kind == "copy":
                spent, used = copied(llm, n_tokens), 0.0
            else:
                spent, used = published(llm, context, kind, processor_ms)
            if repetition >= WARM_UP:
                wall[kind].append(spent)
                if kind in processor:
                    processor[kind].append(used)
    return {"publish": wall, "save_processor": processor}


def processor_ms(call: Callable[[], Any]) -> float:
    """Of all threads of this process."""
    started = time.process_time()
    call()
    return (time.process_time() - started) * 1e3


def published(
    llm: Any, context: list[int], kind: str, of_save: Callable[[Callable[[], Any]], float]
) -> tuple[float, float]:
    """Milliseconds of one publish, and what ``of_save`` finds of its worker's save."""
    own, found = saver(llm), []
    save = own.save
    own.save = lambda job: found.append(of_save(lambda: save(job)))
    try:
        spent, handle = timed(llm.publish, agent="sender", prompt=context, audience=kind)
    finally:
        del own.save
    worker_store(llm).delete(handle.handle)  # the store's disk is not what is measured
    return spent, max(found)


def copied(llm: Any, n_tokens: int) -> float:
    """Milliseconds for a copy of as many bytes as a segment has."""
    source = torch.ones(segment_bytes(llm, n_tokens), dtype=torch.uint8)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source))[0]


def segment_bytes(llm: Any, n_tokens: int) -> int:
    pages = saver(llm)._pages.layers
    return sum(n_tokens * p.heads * 2 * p.dim * p.pages.element_size() for p in pages)


def saver(llm: Any) -> Any:
    """Of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.saver


def peaks(llm: Any, n_tokens: int, vocab: int) -> dict[str, int]:
    """Bytes beside the segment that saving one takes, for each kind."""
    rng, own = random.Random(n_tokens), segment_bytes(llm, n_tokens)
    context = [rng.randrange(64, vocab) for _ in range(n_tokens)]
    return {kind: int(published(llm, context, kind, peak_bytes)[1]) - own for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        model=("nano", "nano, a folder or a hub repository"),
        guard=("gate", "name in the policy"),
        guard_path=("nano:gate", "its folder"),
        repeats=15,
        seed=0,
        dtype="float32",
        maps=("per_head", "of the synthetic gate"),
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--synthetic", nargs="*", default=[], metavar="TOKENSxLAYERS")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1 or args.repeats < 1:
        raise ValueError(f"--tokens {args.tokens} --repeats {args.repeats}: use 1 or more")
    sizes = [tuple(map(int, text.split("x"))) for text in args.synthetic]
    rows = engine_rows(args)
    synthetic = []
    for n_tokens, layers in sizes:
        shape = KVShape(layers, 8, 128)
        synthetic.append(measure(shape, n_tokens, torch.bfloat16, {"maps": args.maps}))
        print(synthetic[-1])
    command = "python scripts/bench_publish.py --tokens " + " ".join(map(str, args.tokens))
    command += f" --repeats {args.repeats}"
    if args.model != "nano":
        command += f" --model FOLDER --guard {args.guard} --guard-path {args.guard_path}"
        command += f" --dtype {args.dtype}"
    if sizes:
        command += f" --maps {args.maps} --synthetic {' '.join(args.synthetic)}"
    found = {
        "unit": "ms",
        "model": Path(args.model).name,
        "guard": args.guard,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        # of the longest context where several were measured
        "publish_ms": rows[-1]["publish_ms"],
        "peak_extra_bytes": rows[-1]["peak_extra_bytes"],
        "rows": rows,
        "synthetic": synthetic,
    }
    write_report(args, "What a guard adds to a publish", command, found)
    return 0


def engine_rows(args: Any) -> list[dict[str, Any]]:
    """One row for each number of tokens, of one engine."""
    rows = []
    with opened(args, max(args.tokens), cache_gib=1) as (llm, vocab):
        for n_tokens in sorted(args.tokens):
            raw = publishes(llm, n_tokens, args.repeats, vocab, args.seed)
            spent, used = medians(raw["publish"]), medians(raw["save_processor"])
            row = {
                "tokens": n_tokens,
                "publish_ms": {k: spent[k] for k in KINDS},
                "copy_ms": spent["copy"],
                "save_processor_ms": used,
                "guarded_over_vanilla": round(spent["guarded"] / spent["vanilla"], 4),
                "segment_bytes": segment_bytes(llm, n_tokens),
                "peak_extra_bytes": peaks(llm, n_tokens, vocab),
                "raw_ms": raw,
            }
            rows.append(row)
            print({k: v for k, v in row.items() if k != "raw_ms"})
    return rows


if __name__ == "__main__":
    run_script(main)
