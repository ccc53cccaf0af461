"""Trains a guard of one prefill for SmolLM2: the gate on its traces, or KVEraser's states.

    LCGUARD_DATA=PATH python scripts/train_single_pass.py --out runs/trace-gate
    LCGUARD_DATA=PATH python scripts/train_single_pass.py --set guard=kveraser \
        --set fit.steps=80 --set fit.batch=4 --out runs/kveraser

Both take over the detector of smollm2:twin and are distilled on the twin's KV. How they compare
with it: lcguard eval run single-pass --set model=smollm2 --data PATH.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.script import run_script
from lcguard.config import load_config
from lcguard.evaluation.load import hops_for, load_guard
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.guards import FrozenGuard, KVShape, guard_class
from lcguard.guards.kveraser import KVEraserGuard
from lcguard.guards.single_pass import SinglePassGuard
from lcguard.guards.trace_gate import TraceGateGuard
from lcguard.guards.twin import TwinGuard
from lcguard.training.fit_single_pass import (
    SinglePassConfig,
    fit_kveraser,
    fit_trace_gate,
    policies,
    read_traces,
)

CONFIG = Path(__file__).parent.parent / "agents" / "smollm2" / "single-pass.yaml"
KINDS = ("trace_gate", "kveraser")


@dataclass(frozen=True)
class SinglePassRun:
    model: str = "smollm2"
    detector: str = "smollm2:twin"
    """A guard ``twin`` of the model."""
    guard: str = "trace_gate"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the guard, such as ``rank`` or ``noise``."""
    sources: tuple[DataConfig, ...] = ()
    """Their ``train_records`` are what it is fitted on."""
    fit: SinglePassConfig = field(default_factory=SinglePassConfig)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the guard")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="override a key")
    args = parser.parse_args(argv)
    run = load_config(SinglePassRun, CONFIG, args.sets)
    if run.guard not in KINDS:
        raise ValueError(f"guard {run.guard!r} is not of one prefill: use {' or '.join(KINDS)}")
    backend = load_backend(run.model)
    source, neutral = backend.source, backend.special.neutral_id
    twin = load_guard(GuardSpec("detector", path=run.detector), backend).module
    if not isinstance(twin, TwinGuard):
        raise ValueError(f"detector: {run.detector} is guard {twin.name!r}, not 'twin'")
    options = {**run.options, "detector": twin.options()}
    module = guard_class(run.guard).build(KVShape(*source.shape), len(CATEGORIES), options)
    records = policies([r for d in run.sources for r in backend.encoder.encode(hops_for(d)[0])])
    print(f"{len(records)} records", flush=True)

    def say(step: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step}: {loss:.4f}", flush=True)

    assert isinstance(module, SinglePassGuard)
    module.start_from(twin)
    figures: dict[str, float] = {}
    if isinstance(module, TraceGateGuard):
        figures = fit_trace_gate(
            module, read_traces(module, records, source, neutral), run.fit, say
        )
        print(json.dumps(figures), flush=True)
    elif isinstance(module, KVEraserGuard):
        module.start_at(read_traces(module, records[:24], source, neutral).constant)
        fit_kveraser(module, records, source, neutral, run.fit, say)
    training = {
        "command": shlex.join(["python", *sys.argv]),
        "config": json.loads(json.dumps(asdict(run))),
        **figures,
    }
    guard = FrozenGuard(module).with_card(
        model_id=run.model, model_digest=backend.digest, training=training
    )
    guard.save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
