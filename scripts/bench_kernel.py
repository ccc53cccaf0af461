"""Bandwidth of the paged KV rewrite, as a share of what the device copies.

python scripts/bench_kernel.py                                   # print
python scripts/bench_kernel.py --out benchmarks/results/kernel.json

Paired: every repetition copies a large buffer (bytes read and written) and then rewrites all layers
of a segment, from pages in random order. What must move is the segment's bytes twice: read out of
the pages, written to the segment. Without a CUDA device it times the reference on a small shape;
the report then says that no GPU was measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script, script_parser, write_report
from lcguard.guards.base import KVShape, guard_class
from lcguard.guards.gate import GateGuard
from lcguard.noise import new_noise_key
from lcguard.ops.dispatch import choose, rewrite_layer
from lcguard.ops.work import Decision, work_of
from lcguard.protocols import Mask
from lcguard.rope import Rotary

BLOCK = 16
"""Rows of a page block."""
GUARDS = ("identity", "gaussian", "residual", "gate")
# Qwen3-8B, and the agents of the demo where there is no GPU.
DEFAULTS: dict[str, dict[str, int | str]] = {
    "cuda": {"layers": 36, "kv_heads": 8, "head_dim": 128, "tokens": 32768, "dtype": "bfloat16"},
    "cpu": {"layers": 4, "kv_heads": 2, "head_dim": 32, "tokens": 2048, "dtype": "float32"},
}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def timed_ms(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call, until the device is done."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def rewriter(guard: str, args: argparse.Namespace, device: str) -> tuple[Callable[[], None], str]:
    """A call that rewrites every layer into one segment, and what runs it."""
    shape, dtype = KVShape(args.layers, args.kv_heads, args.head_dim), getattr(torch, args.dtype)
    blocks = -(-args.tokens // BLOCK)
    size = args.layers, blocks, BLOCK, args.kv_heads, 2 * args.head_dim
    # layer by layer, rows before heads: vLLM's default order
    pages = torch.randn(size, dtype=dtype, device=device).transpose(2, 3)
    table = torch.randperm(blocks, device=device)
    position = torch.arange(args.tokens, device=device)
    slots = table[position // BLOCK] * BLOCK + position % BLOCK
    segment = torch.empty(
        2, args.layers, args.kv_heads, args.tokens, args.head_dim, dtype=dtype, device=device
    )
    half = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    rotary = Rotary("default", args.head_dim, tuple((1e6**-half).tolist()))
    module = guard_class(guard).build(shape, len(CATEGORIES), {}).to(device)
    decision, key = None, new_noise_key()
    if isinstance(module, GateGuard):
        mask = Mask(*torch.ones(2, 1, len(CATEGORIES), dtype=torch.bool))
        words = torch.rand(args.tokens, module.config.words, device=device).softmax(-1)
        closed = torch.rand(args.tokens, args.layers, 2, device=device)
        decision = Decision(closed, words, mask)
        with torch.no_grad():  # as after training: no longer the identity
            module.squeeze.mul_(0.9)
    work = [work_of(module, i, noise_key=key, decision=decision) for i in range(args.layers)]
    views: list[tuple[Tensor, Tensor]] = [
        (p[..., : args.head_dim], p[..., args.head_dim :]) for p in pages
    ]

    def rewrite() -> None:
        for layer, view in enumerate(views):
            rewrite_layer(*view, slots, rotary, 0, work[layer], *segment[:, layer])

    return rewrite, choose(*views[0], *segment[:, 0])


def spread(raw: Sequence[float]) -> dict[str, Any]:
    rounded = [round(x, 4) for x in raw]
    return {
        "median": round(statistics.median(raw), 4),
        "min": min(rounded),
        "max": max(rounded),
        "raw": rounded,
    }


def measure(guard: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """One guard beside the copy, in turns."""
    source = torch.randint(0, 255, (COPY_BYTES[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rewrite, implementation = rewriter(guard, args, device)
    for _ in range(3):  # compilation, first touches of memory, clocks
        target.copy_(source)
        rewrite()
    copy_ms, rewrite_ms = [], []
    for _ in range(args.repeats):
        copy_ms.append(timed_ms(lambda: target.copy_(source), device))
        rewrite_ms.append(timed_ms(rewrite, device))
    itemsize = getattr(torch, args.dtype).itemsize
    moved = 2 * 2 * args.layers * args.kv_heads * args.tokens * args.head_dim * itemsize
    speeds = 2 * len(source) / statistics.median(copy_ms), moved / statistics.median(rewrite_ms)
    return {
        "guard": guard,
        "implementation": implementation,
        "moved_bytes": moved,
        "rewrite_ms": spread(rewrite_ms),
        "copy_ms": spread(copy_ms),
        "copy_gb_per_s": round(speeds[0] / 1e6, 3),
        "rewrite_gb_per_s": round(speeds[1] / 1e6, 3),
        "share_of_copy": round(speeds[1] / speeds[0], 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = 20 if device == "cuda" else 5
    parser = script_parser(__doc__, **DEFAULTS[device], repeats=repeats)
    parser.add_argument("--guard", nargs="+", choices=GUARDS, default=list(GUARDS[:3]))
    args = parser.parse_args(argv)
    if args.dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype {args.dtype}: use float32, float16 or bfloat16")
    sizes = {name: getattr(args, name) for name in DEFAULTS[device]}
    counts = [v for v in (*sizes.values(), args.repeats) if isinstance(v, int)]
    if min(counts) < 1 or args.head_dim % 2:
        raise ValueError(f"{sizes}, --repeats {args.repeats}: use 1 or more, an even --head-dim")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "not measured on GPU"
    print(f"{gpu}; {', '.join(f'{k} {v}' for k, v in sizes.items())}")
    print(f"{'guard':10} {'by':10} {'rewrite ms':>11} {'GB/s':>8} {'copy GB/s':>10} {'share':>7}")
    rows = []
    for guard in args.guard:
        row = measure(guard, args, device)
        rows.append(row)
        print(
            f"{guard:10} {row['implementation']:10} {row['rewrite_ms']['median']:11.3f} "
            f"{row['rewrite_gb_per_s']:8.2f} {row['copy_gb_per_s']:10.2f} "
            f"{row['share_of_copy']:7.3f}"
        )
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in sizes.items())
    command = f"python scripts/bench_kernel.py {options} --repeats {args.repeats}"
    command += f" --guard {' '.join(args.guard)}"
    found = {"gpu": gpu, "threads": torch.get_num_threads(), **sizes, "block_tokens": BLOCK}
    found |= {"repeats": args.repeats, "rows": rows}
    write_report(args, "Bandwidth of the paged KV rewrite", command, found)
    return 0


if __name__ == "__main__":
    run_script(main)
