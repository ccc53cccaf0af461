"""Trains a guard end to end: data, loop, held-out check, certificate, card."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.files import ScenarioWarning
from lcguard.agents.scenarios.load import load_hops
from lcguard.agents.scenarios.types import Hop
from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.attacks.base import attack_class
from lcguard.categories import CATEGORIES
from lcguard.commands.train_summary import verdict_of
from lcguard.config import dump_config, load_config
from lcguard.evaluation.folder import first_difference, plain
from lcguard.evaluation.hop_segments import is_task
from lcguard.evaluation.load import hops_for, known_values, load_guard
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.plan import DataConfig, GuardSpec
from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.shipped import CARD
from lcguard.protocols import KVBatch
from lcguard.records import TokenRecord
from lcguard.tracking import Tracker, flat, track
from lcguard.training.adversary import Adversary
from lcguard.training.certificate import Certificate, certify
from lcguard.training.config import TrainConfig
from lcguard.training.dataset import with_policy
from lcguard.training.estimate import estimate, machine_bytes
from lcguard.training.joint import guarded_path, observed
from lcguard.training.known_values import KnownValues
from lcguard.training.rollback import SNAPSHOT
from lcguard.training.trainer import Run, check_trained, make_module, train_guard


@dataclass(frozen=True)
class TrainRun:
    """A training run's YAML file."""

    model: str = "nano"
    data: DataConfig = field(
        default_factory=lambda: DataConfig(seed=5000, train_records=3000, test_records=500)
    )
    """``train`` is trained on; ``test`` serves the certificate and the held-out check alone."""
    init: str = ""
    """A trained guard to go on from: a folder, or ``nano:NAME``; its options must be the same but
    for ``noise``."""
    average: float = 1.0
    """Share of this run's weights in an average with those of ``init``; 1 keeps them as they are.
    The average of two ends of one trajectory often lies better than both."""
    average_with: str = ""
    """Another guard than ``init`` to average with: a folder, or ``nano:NAME``."""
    train: TrainConfig = field(default_factory=TrainConfig)
    hard: str = ""
    """JSONL of records that the guard of ``init`` failed on: trained on beside those of ``data``,
    and alone in the first ``train.hard_steps``."""


def adversary_factory(name: str) -> Callable[[dict[str, Any]], Adversary]:
    """Attacks that can stand in the loop."""

    def make(options: dict[str, Any]) -> Adversary:
        return attack_class(name).build(options).as_adversary()

    return make


def run_training(
    run: TrainRun,
    out: Path,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Trains, certifies and writes ``out/guard``, ``config.yaml``, ``metrics.jsonl`` and
    ``summary.json``; a run that was killed goes on from its checkpoint, and in its run of
    ``tracker``. Of several processes of `accelerate launch` the first alone writes and says
    anything; the others return nothing.

    Raises ``ValueError`` in one line for data, model or options that do not fit.
    """
    main = os.environ.get("RANK", "0") == "0"  # as accelerate launch says it
    if not main:
        say = _silent
    # everything that can be wrong with the input is found before anything is written
    check_trained(run.train.guard)
    check_folder(run, out)
    backend = load_backend(run.model, device)
    make_module(run.train, backend.source)
    first = start_guard(run, backend)
    if run.average_with:
        load_other(run, backend)
    if not run.train.steps and first is None:
        raise ValueError("steps=0 trains nothing: set init to a trained guard, or steps above 0")
    train, test = (backend.encoder.encode(hops) for hops in hops_for(run.data))
    hard = backend.encoder.encode(hard_hops(run.hard))
    if not train or not test:
        raise ValueError(f"{run.data.source}: no records to train on or to certify with")
    if main:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "config.yaml", dump_config(run).encode(), mode=PUBLIC)
    more = f" ({len(hard)} more to begin with)" if hard else ""
    say(f"{len(train)} training{more} and {len(test)} held-out records, model {run.model}")
    takes = estimate(backend.source.model.config.get_text_config(), run.train.batch)
    say(f"batch {run.train.batch}: {takes.line(run.train.steps)}")
    if takes.bytes > machine_bytes():
        say("that is more memory than this machine has: lower train.batch")
    with track(
        tracker if main else None,
        out,
        "train",
        asdict(run),
        {"lcguard.model_digest": backend.digest},
        say,
    ) as tracked:
        done = train_guard(
            run.train,
            train,
            backend.source,
            backend.special,
            out,
            adversary_factory(run.train.adversary.attack),
            first,
            hard=hard,
            written=tracked.rows,
        )
        if not main:
            return {}
        tracked.rows(done.metrics)
        other = first if not run.average_with else load_other(run, backend)
        if other is not None:
            average_weights(done.guard, other, run.average)
        say(f"trained {run.train.steps} steps in {done.seconds:.0f} s")
        known = known_values(run.data, backend, train)
        guard, figures = finish(run, done, backend, test, known, command)
        guard.save_pretrained(out / "guard")
        summary = {
            "guard": run.train.guard,
            "seconds": round(done.seconds, 1),
            "processes": done.processes,
            **figures,
            "verdict": verdict_of(guard.card, figures),
            "run": run_manifest(command, [run.train.seed], run),
        }
        text = json.dumps(summary, indent=1, default=str) + "\n"
        replace_file(out / "summary.json", text.encode(), mode=PUBLIC)
        for name in ("checkpoint.safetensors", SNAPSHOT):
            (out / name).unlink(missing_ok=True)
        tracked.figures(flat({**figures, "seconds": done.seconds}))
        tracked.tags({"lcguard.guard_digest": guard.digest, "lcguard.verdict": summary["verdict"]})
        tracked.artefact(CARD, guard.card.model_dump(mode="json"))
        tracked.artefact("summary.json", json.loads(text))
        return summary


def _silent(text: str) -> None:
    pass


def hard_hops(path: str) -> list[Hop]:
    """The records of ``TrainRun.hard``; none without a file. Raises ``ScenarioError``."""
    if not path:
        return []
    with warnings.catch_warnings():  # of values that stand again, which are guarded too
        warnings.simplefilter("ignore", ScenarioWarning)
        return load_hops("jsonl", path=Path(path))


def check_folder(run: TrainRun, out: Path) -> None:
    """Raises ``ValueError`` where ``out`` holds a training with another configuration, finished or
    not, naming the first key in which they differ."""
    kept = out / "config.yaml"
    if not kept.exists():
        return
    found = first_difference(plain(load_config(TrainRun, kept)), plain(run))
    if found is not None:
        name, there, here = found
        raise ValueError(
            f"{out} holds a run with another configuration: {name} is {there!r} there and {here!r} "
            f"here; go on with `lcguard train {kept} --out {out}`, or give another --out"
        )


def average_weights(guard: FrozenGuard, other: FrozenGuard, share: float) -> None:
    """``share`` of the guard's own weights and the rest of the other's, in place.

    Raises ``ValueError`` for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"average={share} must be within 0..1")
    theirs = other.module.state_dict()
    mixed = {k: share * v + (1 - share) * theirs[k] for k, v in guard.module.state_dict().items()}
    guard.module.load_state_dict(mixed)


def certificate_of(
    config: TrainConfig,
    guard: FrozenGuard,
    held_out: list[TokenRecord],
    backend: HFBackend,
    known: KnownValues,
) -> Certificate | None:
    """As a training with these settings takes it; None as ``certify``."""
    return certify(
        guard.module,
        held_out,
        backend.source,
        level=config.certificate_level,
        seed=config.seed + 1,
        known=known,
        references=config.certificate_references,
    )


def finish(
    run: TrainRun,
    done: Run,
    backend: HFBackend,
    test: list[TokenRecord],
    known: KnownValues,
    command: str,
) -> tuple[FrozenGuard, dict[str, Any]]:
    """The guard with its card, and the held-out figures that stand on it."""
    held_out = with_policy(test[: run.train.certificate_pairs], CATEGORIES)
    certificate = None
    if run.train.pair_weight > 0 or run.train.twin_weight > 0:
        found = certificate_of(run.train, done.guard, held_out, backend, known)
        certificate = found.to_dict() if found else None
    figures = held_out_figures(run, done, held_out, backend)
    training = {"command": command, "config": asdict(run), "seconds": round(done.seconds, 1)}
    guard = done.guard.with_card(
        model_id=run.model,
        model_digest=backend.digest,
        certificate=certificate,
        training={**training, **figures},
    )
    return guard, {"certificate": certificate, **figures}


def start_guard(run: TrainRun, backend: HFBackend) -> FrozenGuard | None:
    """The guard to go on from. Raises ``ValueError`` where it is another guard than configured."""
    return _same_guard("init", run.init, run, backend) if run.init else None


def load_other(run: TrainRun, backend: HFBackend) -> FrozenGuard:
    """The guard to average with; as ``start_guard``."""
    return _same_guard("average_with", run.average_with, run, backend)


def _same_guard(key: str, path: str, run: TrainRun, backend: HFBackend) -> FrozenGuard:
    made = re.fullmatch(r"runs/([\w-]+)/guard", path)
    if made and not Path(path).is_dir():
        raise ValueError(
            f"{key} {path!r} is not there: make it first with "
            f"`lcguard train {made[1]} --out runs/{made[1]}`"
        )
    guard = load_guard(GuardSpec(key, path=path), backend)
    wanted = make_module(run.train, backend.source)
    # the noise is no weight: another level of it fits the same ones
    free = {"noise": None}
    if guard.name != run.train.guard or (
        {**guard.module.options(), **free} != {**wanted.options(), **free}
    ):
        raise ValueError(
            f"{key} {path!r} is {guard.name} {guard.module.options()}, the run wants "
            f"{run.train.guard} {wanted.options()}"
        )
    return guard


def held_out_figures(
    run: TrainRun, done: Run, records: list[TokenRecord], backend: HFBackend
) -> dict[str, float | None]:
    """Utility on held-out records, and what the training-time attackers recover of them."""
    hops = run.train.path_hops
    n = len(records) // hops
    groups = [records[k * n : (k + 1) * n] for k in range(hops)]
    guard = FrozenGuard(done.guard.module)
    segments = guarded_path(guard, groups, backend.source, backend.special, seed=9)
    right, before = [], []
    for group, kv in zip(groups, segments, strict=True):
        raw = backend.source.prefill([r.ids for r in group])
        right += [x for row in backend.source.exact_match(group, kv, is_task) for x in row]
        before += [x for row in backend.source.exact_match(group, raw, is_task) for x in row]
    flat = [r for group in groups for r in group]
    data = observed(flat, KVBatch.stack(segments), backend.special, hops)
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
