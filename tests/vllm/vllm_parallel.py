"""Run by tests/vllm/test_vllm_parallel.py in a process of its own. Prints one line of JSON.

Two ranks, bfloat16, loads beside the forward pass, and so few blocks that requests are preempted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.store import open_store
from lcguard.vllm.llm import GuardedLLM
from tests.engine import KEY, policy, question, records


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference as a share of the spread."""
    return float((found.float() - wanted).square().mean().sqrt() / wanted.std())


def main(folder: str) -> None:
    from vllm import SamplingParams

    agent = load_backend("nano")
    store = f"file://{Path(folder) / 'store'}"
    llm = GuardedLLM.build(
        str(model_path()),
        policy=policy(),
        guards={"gate": "nano:gate"},
        store=store,
        settings={"store_timeout_s": 120},  # a busy machine is no failure
        dtype="bfloat16",
        block_size=32,
        max_model_len=512,
        max_num_batched_tokens=96,
        enforce_eager=True,
        tensor_parallel_size=2,
        num_gpu_blocks_override=26,
        disable_log_stats=False,
    )
    chosen = records(agent, 6, seed=501)

    def run(prompts: list[Any], handoffs: list[Any], n: int) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=n,
                ignore_eos=True,
                extra_args={"kv_transfer_params": {"lcguard": h}} if h else None,
            )
            for h in handoffs
        ]
        made = [{"prompt_token_ids": list(p)} for p in prompts]
        out = llm.engine.generate(made, params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in out]

    asks = [question(r).prompt for r in chosen]
    alone = [run([[*r.ids, *a]], [None], 90)[0] for r, a in zip(chosen, asks, strict=True)]
    handles = [llm.publish(agent="intake", prompt=list(r.ids), audience="identity") for r in chosen]
    handoffs = [
        {"consume": {"agent": "identity", "segments": [{"handle": h.handle, "grant": h.grant}]}}
        for h in handles
    ]
    together = run([list(a) for a in asks], handoffs, 90)
    metrics = {m.name: getattr(m, "value", None) for m in llm.engine.get_metrics()}
    opened = open_store(store)
    segment = opened.load(handles[0].handle, bytes.fromhex(KEY))
    wanted = agent.source.prefill([chosen[0].ids])
    opened.delete(handles[1].handle)
    (missing,) = llm.engine.generate(
        [{"prompt_token_ids": list(asks[1])}],
        SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": {"lcguard": handoffs[2]}}),
        use_tqdm=False,
    )
    print(
        "RESULT"
        + json.dumps(
            {
                "same": [
                    sum(x == y for x, y in zip(a, t, strict=True)) / len(a)
                    for a, t in zip(alone, together, strict=True)
                ],
                "first": [a[:4] == t[:4] for a, t in zip(alone, together, strict=True)],
                "preemptions": metrics.get("vllm:num_preemptions"),
                "shape": list(segment.keys.shape),
                "dtype": str(segment.keys.dtype),
                "key_error": relative(segment.keys, wanted.keys[0]),
                "value_error": relative(segment.values, wanted.values[0]),
                "alive": missing.outputs[0].finish_reason,
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
