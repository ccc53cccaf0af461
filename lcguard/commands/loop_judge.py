"""Third step of a round: fresh attackers, utility and certificate, on records no training saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lcguard.agents.backends.hf import load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.loop_config import LoopConfig
from lcguard.commands.loop_files import read_step, write_step
from lcguard.commands.loop_train import CANDIDATE, read_marks, read_trained
from lcguard.commands.loop_verdict import decide
from lcguard.commands.record import record
from lcguard.evaluation.folder import RunFolder, RunJournal
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.plan import EvalConfig, GuardSpec
from lcguard.evaluation.results import GuardRow
from lcguard.evaluation.run import evaluate
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.guards.registry import Judgement, Registry, RegistryError, record_mark
from lcguard.tracking import Tracker, flat, track
from lcguard.training.certificate import Certificate, certify
from lcguard.training.dataset import with_policy

JUDGED, RUNS = "judged.json", "judgements"
RAW, NEW = "raw", "candidate"


class Judged(BaseModel):
    """What was judged, and how it ended: what ``judged.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Of the guard, within the round's folder or from the root."""
    digest: str
    """Empty for one that cannot be loaded."""
    judgement: Judgement


@dataclass(frozen=True)
class Origin:
    """What is known of a candidate's training."""

    marks: frozenset[str] = frozenset()
    """Of the records that it, or what it was trained from, has seen."""
    parent: str = ""
    run: str = ""


def judge(
    config: LoopConfig,
    registry: Registry,
    out: Path,
    command: str = "lcguard loop judge",
    *,
    guard: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    tracker: Tracker | None = None,
) -> Judged:
    """Judges the round's candidate, or the ``guard`` of a folder of yours, against the live one.

    A guard that is judged already keeps its judgement: nothing is tried again until it passes. The
    report lies in ``out/judgements/DIGEST``; a killed run goes on there. Raises ``ValueError``
    where the records that it would be judged on were trained on.
    """
    folder = out / CANDIDATE / "guard" if guard is None else guard
    try:
        frozen = FrozenGuard.from_pretrained(folder)
    except GuardError as error:
        return _kept(out, Judged(folder=_within(out, folder), digest="", judgement=_no(str(error))))
    if (out / JUDGED).exists() and (known := read_judged(out)).digest == frozen.digest:
        return known
    origin = origin_of(registry, out, frozen.digest)
    plan = plan_of(config, registry, folder, frozen.digest)
    seen = sum(record_mark(h.record.text) in origin.marks for h in hops_for(plan.data)[1])
    if seen:
        raise ValueError(
            f"{seen} of the records to judge on were trained on: set judge.data to others"
        )
    run = out / RUNS / frozen.digest[:12]
    try:
        report = evaluate(plan, run, command, say, device=device, tracker=tracker)
    except GuardError as error:  # for another model, of another shape, ...
        return _kept(out, Judged(folder=_within(out, folder), digest="", judgement=_no(str(error))))
    rows = {r["guard"]: GuardRow.of(r) for r in report["results"]}
    with RunJournal(RunFolder(run).journal_file) as journal:
        attempts = [a for a in journal.attempts() if a.guard == NEW and a.kind == "attack"]
    judgement = decide(
        rows[NEW],
        attempts,
        rows[RAW].asr_fresh,
        certificates(config, registry, plan, frozen, device),
        limit=config.limit,
        utility_share=config.utility_share,
    )
    record(run, NEW, folder)  # servers read the card
    word = "accepted" if judgement.accepted else "refused"
    with track(tracker, run, "eval", {}, {"lcguard.judgement": word}, say) as tracked:
        tracked.tags({"lcguard.reason": judgement.reason})
        tracked.figures(flat(judgement.figures))
    return _kept(
        out, Judged(folder=_within(out, folder), digest=frozen.digest, judgement=judgement)
    )


def plan_of(config: LoopConfig, registry: Registry, folder: Path, digest: str) -> EvalConfig:
    """The evaluation: raw KV for the ceiling, by the cheapest attack, and the candidate. Generated
    records are drawn by the candidate's digest: nobody could know them while it was trained."""
    cheapest, data = config.judge.attacks[0].name, config.judge.data
    if data.source == "generator":  # of other sources the seed says who trains on what
        data = replace(data, seed=int(digest[:7], 16))
    return replace(
        config.judge,
        model=config.model,
        data=data,
        guards=(
            GuardSpec(RAW, guard="identity", attacks=(cheapest,)),
            GuardSpec(NEW, path=str(folder)),
        ),
        policy_guard=NEW,
    )


def certificates(
    config: LoopConfig,
    registry: Registry,
    plan: EvalConfig,
    candidate: FrozenGuard,
    device: str | None,
) -> tuple[Certificate | None, Certificate | None]:
    """The candidate's and the live guard's, on the same records as the attackers' victims."""
    backend, state = load_backend(config.model, device), registry.state
    test = backend.encoder.encode(hops_for(plan.data)[1])[: config.certificate_pairs]
    records = with_policy(test, CATEGORIES)
    found = []
    for guard in (candidate, registry.load(state.live_version) if state.live else None):
        fits = guard is not None and not guard.needs_twin
        found.append(
            certify(guard.module, records, backend.source, seed=config.seed)
            if guard is not None and fits
            else None
        )
    return found[0], found[1]


def origin_of(registry: Registry, out: Path, digest: str) -> Origin:
    """Of the round's candidate; of another guard only what the registry knows of the live one."""
    state = registry.state
    try:
        trained = read_trained(out)
    except ValueError:
        trained = None
    if trained is None or trained.digest != digest:
        return Origin(registry.marks(state.live_version) if state.live else frozenset())
    parent = state.of_digest(trained.parent)
    before = registry.marks(parent) if parent is not None else frozenset()
    return Origin(read_marks(out) | before, trained.parent, trained.run)


def read_judged(out: Path) -> Judged:
    """Raises ``ValueError`` where ``judge`` did not end there."""
    return read_step(Judged, out / JUDGED, "judge")


def guard_of(judged: Judged, out: Path) -> Path:
    """Where the guard that was judged lies."""
    return out / judged.folder


def promote(registry: Registry, out: Path, why: str = "") -> str:
    """Last step of a round: adds what was judged to the registry, and makes it live where it was
    accepted; the version's name, empty for a guard that cannot be loaded.

    Raises ``RegistryError`` where the guard is no longer the one that was judged.
    """
    judged = read_judged(out)
    if not judged.digest:
        return ""
    folder = guard_of(judged, out)
    try:
        now = FrozenGuard.from_pretrained(folder).digest
    except GuardError as error:
        raise RegistryError(str(error)) from error
    if now != judged.digest:
        raise RegistryError(
            f"{folder} holds {now[:12]}, judged was {judged.digest[:12]}: judge it again"
        )
    origin = origin_of(registry, out, judged.digest)
    own = read_marks(out) if origin.run else frozenset[str]()
    version = registry.add(
        folder, judged.judgement, parent=origin.parent, run=origin.run, marks=own
    )
    if judged.judgement.accepted:
        registry.promote(version.name, why or judged.judgement.reason)
    return version.name


def _kept(out: Path, judged: Judged) -> Judged:
    out.mkdir(parents=True, exist_ok=True)
    write_step(out / JUDGED, judged)
    return judged


def _no(why: str) -> Judgement:
    return Judgement(accepted=False, reason=" ".join(why.split()))


def _within(out: Path, folder: Path) -> str:
    """A round's folder may be moved with all that is in it."""
    inside = folder.resolve().is_relative_to(out.resolve())
    return str(folder.resolve().relative_to(out.resolve()) if inside else folder.resolve())
