"""Second step of a round: a candidate, trained on from the live guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lcguard.atomic_file import PUBLIC, replace_file
from lcguard.canonical import canonical_digest
from lcguard.commands.canary_screen import ATTACKS
from lcguard.commands.loop_collect import HARD, Leaked, read_leak
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_files import read_step, write_step
from lcguard.commands.train import TrainRun, hard_hops, run_training
from lcguard.evaluation.folder import plain
from lcguard.evaluation.load import hops_for
from lcguard.guards.frozen import FrozenGuard
from lcguard.guards.registry import Registry, Version, record_mark
from lcguard.tracking import Tracker
from lcguard.training.config import AdversaryConfig

CANDIDATE, TRAINED, MARKS = "candidate", "train.json", "records.txt"


class Trained(BaseModel):
    """Where a candidate comes from: what ``train.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    parent: str
    """Digest of the guard that it was trained on from."""
    run: str
    """Digest of the training's configuration."""
    steps: int
    attacker_steps: int
    """Of the attacker in the loop; 0 without one."""
    measured_steps: int
    """Of the attack that was measured."""
    seconds: float


def train(
    config: LoopConfig,
    registry: Registry,
    out: Path,
    command: str = "lcguard loop train",
    *,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    tracker: Tracker | None = None,
) -> Trained | None:
    """Trains ``out/candidate/guard`` from what ``collect`` found; a run that was killed goes on.
    None where there is nothing to learn.

    Raises ``ValueError`` where the live guard is another than then.
    """
    leak = read_leak(out)
    if not leak.needed:
        return None
    if (out / TRAINED).exists():
        return read_trained(out)
    parent = registry.state.live_version
    if parent.digest != leak.guard_digest:
        raise ValueError(
            f"{out} was collected under {leak.version}, live is {parent.name}: start a new round"
        )
    run = training_of(config, leak, registry, parent, out)
    summary = run_training(run, out / CANDIDATE, command, say, device, tracker)
    marks = {record_mark(h.record.text) for h in [*hard_hops(run.hard), *hops_for(run.data)[0]]}
    replace_file(out / MARKS, "".join(f"{m}\n" for m in sorted(marks)).encode(), mode=PUBLIC)
    adversary = run.train.adversary
    trained = Trained(
        digest=FrozenGuard.from_pretrained(out / CANDIDATE / "guard").digest,
        parent=parent.digest,
        run=canonical_digest(_portable(run)),
        steps=run.train.steps,
        attacker_steps=adversary.steps_per_guard_step * _guard_steps(run) * min(1, adversary.count),
        measured_steps=leak.attack_steps,
        seconds=summary["seconds"],
    )
    write_step(out / TRAINED, trained)
    return trained


def training_of(
    config: LoopConfig, leak: Leaked, registry: Registry, parent: Version, out: Path
) -> TrainRun:
    """The round's training: the live guard's kind and options, hard records first, and an attacker
    whose budget is that of the measured one times ``config.budget``."""
    live = registry.load(parent)
    if not live.module.trained or live.module.finds_secrets:
        raise ValueError(
            f"the live guard is {live.name!r}, which this loop does not train: make a new one "
            "(lcguard detect train), then `lcguard loop judge --guard FOLDER` and promote"
        )
    run = replace(
        config.train,
        model=config.model,
        init=str(registry.path(parent)),
        hard=str(out / HARD) if leak.hard_records else "",
        train=replace(config.train.train, guard=live.name, options=live.module.options()),
    )
    adversary = run.train.adversary
    if not adversary.count:
        return run
    n = ceil(config.budget * leak.attack_steps / max(1, _guard_steps(run)))
    changed: AdversaryConfig = replace(adversary, steps_per_guard_step=max(1, n))
    if adversary.attack == leak.attack and not adversary.options:
        changed = replace(changed, options=dict(ATTACKS[leak.attack]))
    return replace(run, train=replace(run.train, adversary=changed))


def read_trained(out: Path) -> Trained:
    """Raises ``ValueError`` where ``train`` did not end there."""
    return read_step(Trained, out / TRAINED, "train")


def read_marks(out: Path) -> frozenset[str]:
    """Marks of the records that the round's candidate was trained on."""
    return frozenset((out / MARKS).read_text(encoding="ascii").split())


def _guard_steps(run: TrainRun) -> int:
    """Those in which an attacker learns too."""
    return run.train.steps - run.train.label_steps


def _portable(run: TrainRun) -> object:
    """Without where its files lie."""
    return plain(run) | {"init": "", "hard": Path(run.hard).name}
