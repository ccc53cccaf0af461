"""One real vLLM engine on the nano agent, in this process, shared by all tests that need one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.nano.load import model_path
from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.registry import Judgement, Registry
from lcguard.guards.shipped import guard_folder
from lcguard.guards.twin import TwinGuard
from lcguard.records import TokenQuestion, TokenRecord
from lcguard.training.fit_detector import (
    DetectorConfig,
    choose_thresholds,
    fit_detector,
    read_records,
)

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not HAS_VLLM, reason="vLLM is not installed here: `make vllm` installs it on x86-64 Linux"
)

KEY = "5a" * 32
GUARDS = ("identity", "gaussian", "residual", "gate", "redact", "twin")


def policy() -> dict[str, Any]:
    """Everything is forbidden; which guard hides it is the audience's name. Some have a neighbour
    with a milder rule."""
    return {
        "version": 1,
        "edges": [
            {"source": "*", "audience": name, "forbid": list(CATEGORIES), "guard": name}
            for name in (*GUARDS, "broken", "live")
        ]
        + [
            {"source": "*", "audience": f"{name}-too", "forbid": ["person"], "guard": name}
            for name in ("gate", "redact", "twin")
        ],
    }


def guard_folders(agent: HFBackend, folder: Path) -> dict[str, str]:
    """The shipped guards, and a Gaussian one with the statistics of this model."""
    gaussian = guard_class("gaussian").build(
        KVShape(*agent.source.shape), len(CATEGORIES), {"noise": 0.5}
    )
    gaussian.fit_statistics(agent.source.prefill([r.ids for r in records(agent, 16)]))
    frozen = FrozenGuard(gaussian).with_card(model_digest=agent.digest, model_id="nano")
    frozen.save_pretrained(folder / "gaussian")
    fit_twin(agent).save_pretrained(folder / "twin")
    return {
        "twin": str(folder / "twin"),
        "gaussian": str(folder / "gaussian"),
        "residual": guard_folder("nano:residual"),
        "gate": "nano:gate",
        # the same weights under a name whose guard the tests break
        "broken": guard_folder("nano:gate"),
        "live": str(registry(folder / "registry").folder),
    }


def registry(folder: Path) -> Registry:
    """Of the engine's guard ``live``: the shipped gate, and another that may take its place."""
    found = Registry(folder, bytes.fromhex(KEY))
    for name in ("nano:gate", "nano:gate-full"):
        word = Judgement(accepted=True, reason="shipped")
        found.add(Path(guard_folder(name)), word)
    found.promote("v1", "the first")
    return found


def fit_twin(agent: HFBackend) -> FrozenGuard:
    """Guard ``twin`` with a small detector, fitted in seconds: it finds most values."""
    config = DetectorConfig(
        steps=120, batch=8, lr=4e-3, warmup=10, dropout=0.0, touch_cost=0.0, task_weight=1.0
    )
    shape = KVShape(*agent.source.shape)
    module = TwinGuard.build(shape, len(CATEGORIES), {"width": 32, "blocks": 1, "peak": 0.0})
    read = read_records(module, records(agent, 64, seed=5), agent.source)
    fit_detector(module, [read], config)
    options = module.options() | {"thresholds": choose_thresholds(module, [read], config)}
    done = TwinGuard.build(shape, len(CATEGORIES), options)
    done.load_state_dict(module.state_dict())
    return FrozenGuard(done).with_card(model_digest=agent.digest, model_id="nano")


def records(agent: HFBackend, n: int, seed: int = 77) -> list[TokenRecord]:
    return agent.encoder.encode(load_hops("generator", seed=seed, split="test", n=n)[:n])


def question(record: TokenRecord, kind: str = "direct", task: bool = True) -> TokenQuestion:
    return next(q for q in record.questions if q.kind == kind and q.task == task)


@dataclass
class Engine:
    """The engine with what the tests look into."""

    llm: Any
    agent: HFBackend
    store: Path

    @property
    def connector(self) -> Any:
        """The connector's half in the scheduler."""
        core = self.llm.engine.llm_engine.engine_core.engine_core
        return core.scheduler.connector

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def run(
        self,
        prompts: list[list[int]],
        handoffs: list[Any] | None = None,
        *,
        max_tokens: int = 12,
        **options: Any,
    ) -> list[Any]:
        """Greedy outputs with log-probabilities; ``handoffs``: the lcguard part of each."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                logprobs=1,
                detokenize=False,
                extra_args=None if h is None else {"kv_transfer_params": {"lcguard": h}},
                **options,
            )
            for h in handoffs or [None] * len(prompts)
        ]
        made = [{"prompt_token_ids": list(p)} for p in prompts]
        return list(self.llm.engine.generate(made, params, use_tqdm=False))


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprobs(output: Any) -> torch.Tensor:
    """Log-probability of each sampled token."""
    (only,) = output.outputs
    return torch.tensor(
        [step[t].logprob for step, t in zip(only.logprobs, only.token_ids, strict=True)]
    )


def make_engine(folder: Path) -> Iterator[Engine]:
    """Starts the engine: prefix caching, chunked prefill of 96 tokens, blocks of 32."""
    os.environ.update(
        LCGUARD_KEY=KEY,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
    )
    from lcguard.vllm.llm import GuardedLLM

    agent = load_backend("nano")
    llm = GuardedLLM.build(
        str(model_path()),
        policy=policy(),
        guards=guard_folders(agent, folder / "guards"),
        unproven=GUARDS,
        store=f"file://{folder / 'store'}",
        dtype="float32",
        block_size=32,
        max_model_len=1024,
        max_num_batched_tokens=96,
        enable_prefix_caching=True,
        enforce_eager=True,
        seed=0,
    )
    yield Engine(llm, agent, folder / "store")
    llm.engine.llm_engine.engine_core.shutdown()
