"""Time to first token of a receiver: the text again, a vanilla KV handoff, a guarded one.

python scripts/bench_handoff.py --tokens 2048 --out benchmarks/results/handoff.json

The three are paired: the same contexts, one after the other in every repetition, in turns that
change, on one vLLM engine without prefix caching. The receiver's clock starts when it has text or
handle. What the sender spends on publishing is beside it, because a guard works there.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcguard.agents.nano.load import model_path
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report

KINDS = ("text", "vanilla", "guarded")
SUFFIX_TOKENS = 16


def policy(guard: str) -> dict[str, Any]:
    """Everything forbidden; the audience says which guard."""
    rules = (("vanilla", "identity"), ("guarded", guard))
    return {
        "version": 1,
        "edges": [
            {"source": "sender", "audience": audience, "forbid": list(CATEGORIES), "guard": name}
            for audience, name in rules
        ],
    }


def timed(call: Callable[..., Any], **options: Any) -> tuple[float, Any]:
    """Milliseconds of wall time, and the result."""
    started = time.perf_counter()
    result = call(**options)
    return (time.perf_counter() - started) * 1e3, result


def measure(llm: Any, n_tokens: int, repeats: int, vocab: int, seed: int) -> dict[str, Any]:
    """Raw timings in milliseconds for contexts of ``n_tokens``, after two runs to warm up."""
    from vllm import SamplingParams

    rng = random.Random(f"{seed}/{n_tokens}")
    once = SamplingParams(temperature=0, max_tokens=1)
    ttft: dict[str, list[float]] = {k: [] for k in KINDS}
    publish: dict[str, list[float]] = {k: [] for k in KINDS[1:]}
    for repetition in range(repeats + 2):
        context = [rng.randrange(64, vocab) for _ in range(n_tokens)]
        question = [rng.randrange(64, vocab) for _ in range(SUFFIX_TOKENS)]
        handles = {}
        for kind in rng.sample(KINDS[1:], 2):
            spent, handles[kind] = timed(llm.publish, agent="sender", prompt=context, audience=kind)
            if repetition > 1:
                publish[kind].append(spent)
        for kind in rng.sample(KINDS, 3):
            text = kind == "text"
            spent, _ = timed(
                llm.generate,
                agent=kind,
                params=once,
                prompt=context + question if text else question,
                consume=[] if text else [handles[kind]],
            )
            if repetition > 1:
                ttft[kind].append(spent)
        for handle in handles.values():  # the store's disk is not what is measured
            worker_store(llm).delete(handle.handle)
    return {"ttft": ttft, "publish": publish}


def worker_store(llm: Any) -> Any:
    """The segment store of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.store


@contextmanager
def opened(
    args: Any, n_tokens: int, cache_gib: int, rules: dict[str, Any] | None = None
) -> Iterator[tuple[Any, int]]:
    """An engine in this process for prompts of so many tokens, and how many its vocabulary has;
    agents hand over by ``policy`` or ``rules``, nothing is taken from a prefix cache."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from lcguard.vllm.llm import GuardedLLM

    longest = n_tokens + 8
    with tempfile.TemporaryDirectory(prefix="lcguard-bench-") as folder:
        llm = GuardedLLM.build(
            str(model_path()) if args.model == "nano" else args.model,
            policy=rules or policy(args.guard),
            guards={args.guard: args.guard_path},
            unproven=[args.guard],
            store=f"file://{folder}/store",
            dtype=args.dtype,
            max_model_len=longest,
            max_num_batched_tokens=max(longest, 2048),
            enable_prefix_caching=False,
            enforce_eager=True,
            seed=0,
        )
        yield llm, llm.engine.llm_engine.vllm_config.model_config.get_vocab_size()


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {k: round(statistics.median(v), 3) for k, v in values.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        model=("nano", "nano, a folder or a hub repository"),
        guard=("gate", "name in the policy"),
        guard_path=("nano:gate", "its folder"),
        repeats=15,
        seed=0,
        dtype="float32",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    args = parser.parse_args(argv)
    if min(args.tokens) < 1 or args.repeats < 1:
        raise ValueError(f"--tokens {args.tokens} --repeats {args.repeats}: use 1 or more")
    nano = args.model == "nano"
    with opened(args, max(args.tokens) + SUFFIX_TOKENS, cache_gib=2) as (llm, vocab):
        rows = []
        for n_tokens in sorted(args.tokens):
            raw = measure(llm, n_tokens, args.repeats, vocab, args.seed)
            ttft = medians(raw["ttft"])
            rows.append(
                {
                    "tokens": n_tokens,
                    "ttft_ms": ttft,
                    "publish_ms": medians(raw["publish"]),
                    "guarded_over_vanilla": round(ttft["guarded"] / ttft["vanilla"], 4),
                    "guarded_over_text": round(ttft["guarded"] / ttft["text"], 4),
                    "raw_ms": raw,
                }
            )
            print(f"{n_tokens:6} tokens  " + "  ".join(f"{k} {v:8.2f} ms" for k, v in ttft.items()))
    command = "python scripts/bench_handoff.py --tokens " + " ".join(map(str, args.tokens))
    if not nano:
        command += f" --model FOLDER --guard {args.guard} --guard-path {args.guard_path}"
        command += f" --dtype {args.dtype} --repeats {args.repeats}"
    found = {
        "unit": "ms",
        "model": Path(args.model).name,
        "guard": args.guard,
        "repeats": args.repeats,
        # of the longest context where several were measured
        "ttft_ms": rows[-1]["ttft_ms"],
        "rows": rows,
    }
    write_report(args, "Time to first token of a receiver", command, found)
    return 0


if __name__ == "__main__":
    run_script(main)
