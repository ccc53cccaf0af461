"""Trains a guard end to end: data, loop, held-out check, certificate, card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.attacks.base import attack_class
from lcguard.attacks.decoder import DecoderAttack
from lcguard.categories import CATEGORIES
from lcguard.commands.compose import hops_for
from lcguard.config import dump_config
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig
from lcguard.evaluation.runner import is_task
from lcguard.guards.frozen import FrozenGuard
from lcguard.records import TokenRecord
from lcguard.training.adversary import Adversary
from lcguard.training.certificate import certify
from lcguard.training.config import TrainConfig
from lcguard.training.dataset import attack_data, guard_all, with_policy
from lcguard.training.trainer import Run, train_guard


@dataclass(frozen=True)
class TrainRun:
    """A training run's YAML file."""

    model: str = "nano"
    data: DataConfig = field(
        default_factory=lambda: DataConfig(seed=5000, train_records=3000, test_records=500)
    )
    """``train`` is trained on; ``test`` serves the certificate and the held-out check alone."""
    train: TrainConfig = field(default_factory=TrainConfig)


def adversary_factory(name: str) -> Callable[[dict[str, Any]], Adversary]:
    """Attacks that can stand in the loop."""

    def make(options: dict[str, Any]) -> Adversary:
        attack = attack_class(name).build(options)
        if not isinstance(attack, DecoderAttack):
            raise ValueError(f"attack {name!r} cannot be an adversary; use decoder")
        return attack

    return make


def run_training(
    run: TrainRun,
    out: Path,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
) -> dict[str, Any]:
    """Trains, certifies and writes ``out/guard``, ``config.yaml``, ``metrics.jsonl`` and
    ``summary.json``; a run that was killed goes on from its checkpoint.

    Raises ``ValueError`` in one line for data, model or options that do not fit.
    """
    backend = load_backend(run.model, device)
    train, test = (backend.encoder.encode(hops) for hops in hops_for(run.data))
    if not train or not test:
        raise ValueError(f"{run.data.source}: no records to train on or to certify with")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(run))
    say(f"{len(train)} training and {len(test)} held-out records, model {run.model}")
    done = train_guard(
        run.train,
        train,
        backend.source,
        backend.special,
        out,
        adversary_factory(run.train.adversary.attack),
    )
    say(f"trained {run.train.steps} steps in {done.seconds:.0f} s")
    held_out = with_policy(test[: run.train.certificate_pairs], CATEGORIES)
    certificate = None
    if run.train.pair_weight > 0 or run.train.twin_weight > 0:
        found = certify(
            done.guard.module,
            held_out,
            backend.source,
            level=run.train.certificate_level,
            seed=run.train.seed + 1,
        )
        certificate = found.to_dict() if found else None
    figures = held_out_figures(done, held_out, backend)
    guard = done.guard.with_card(
        model_id=run.model,
        model_digest=backend.digest,
        certificate=certificate,
        training={
            "command": command,
            "config": asdict(run),
            "seconds": round(done.seconds, 1),
            **figures,
        },
    )
    guard.save_pretrained(out / "guard")
    summary = {
        "guard": run.train.guard,
        "seconds": round(done.seconds, 1),
        "certificate": certificate,
        **figures,
        "run": run_manifest(command, [run.train.seed], run),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return summary


def held_out_figures(
    done: Run, records: list[TokenRecord], backend: HFBackend
) -> dict[str, float | None]:
    """Utility on held-out records, and what the training-time attackers recover of them."""
    raw = backend.source.prefill([r.ids for r in records])
    kv = guard_all(
        FrozenGuard(done.guard.module), records, raw, backend.source, backend.special, seed=9
    )
    right = [x for row in backend.source.exact_match(records, kv, is_task) for x in row]
    before = [x for row in backend.source.exact_match(records, raw, is_task) for x in row]
    data = attack_data(records, kv, backend.special)
    asr = [recovered(m, data) for m in done.ensemble.members]
    return {
        "utility": sum(right) / len(right) if right else None,
        "utility_vanilla": sum(before) / len(before) if before else None,
        "asr_train": max(asr) if asr else None,
    }


def recovered(member: Any, data: Any) -> float:
    """Exact match of a fitted attack, mean over categories."""
    hits: dict[str, list[bool]] = {}
    truth = {r: iter(s) for r, s in zip(data.record_ids, data.secrets, strict=True)}
    for guess in member.recover(data):
        secret = next(truth[guess.record_id])
        hits.setdefault(secret.category, []).append(guess.ids == secret.ids)
    return sum(sum(v) / len(v) for v in hits.values()) / max(1, len(hits))


def with_steps(run: TrainRun, steps: int) -> TrainRun:
    """The same run with another length."""
    return replace(run, train=replace(run.train, steps=steps))
