"""Runs or resumes an evaluation in a folder, or makes its report again from the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.orchestrator import run as run_agents
from lcguard.attacks.base import attack_class
from lcguard.evaluation.answers import VALUE_ONLY, Scoring
from lcguard.evaluation.executors import executor as executor_of
from lcguard.evaluation.folder import FinishedJournal, RunFolder, RunJournal, data_digest
from lcguard.evaluation.fresh_attacks import check_fresh, check_headline
from lcguard.evaluation.graph_segments import GraphSegments, scenarios_of, topology_of
from lcguard.evaluation.graph_summary import GraphRun
from lcguard.evaluation.hashing import digest
from lcguard.evaluation.hop_segments import HopSegments
from lcguard.evaluation.load import fit_plain_guards, hops_for, load_guard
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.outcomes import Journal, Outcome
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.presets import AnyPlan
from lcguard.evaluation.report import write_report
from lcguard.evaluation.results import SCHEMA_VERSION, Report
from lcguard.evaluation.runner import Runner, Setup
from lcguard.evaluation.schedule import HopRun
from lcguard.evaluation.summary import hop_figures
from lcguard.evaluation.tracked import track_report
from lcguard.records import TokenRecord
from lcguard.tracking import Tracker, track

Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """A plan with everything that it needs loaded; of one kind or the other."""

    setup: Setup
    plan: AnyPlan
    hop: HopSegments | None
    graphs: tuple[GraphSegments, ...] = ()

    def data_digest(self) -> str:
        """Sha256 of what attackers are fitted on and what is measured."""
        if self.hop is not None:
            return data_digest(*self.hop.sides)
        return digest(
            [
                [r.text for s in side for a in s.agents for r in a.records]
                for graph in self.graphs
                for side in graph.sides
            ]
        )

    def figures(self, journal: Journal, folder: RunFolder) -> dict[str, Any]:
        """What is particular to the kind; what the journal lacks is done now."""
        runner = Runner(self.setup, journal)
        if isinstance(self.plan, MultihopConfig):
            return GraphRun(runner, self.plan, self.graphs, folder).figures()
        assert self.hop is not None
        figures = hop_figures(HopRun(runner, self.plan, self.hop))
        check_headline(figures["results"], journal.attempts(), self.plan)
        test = self.hop.sides[1]
        return {
            "model": {"name": self.plan.model, "shape": list(self.setup.model.source.shape)},
            "data": {
                "source": self.plan.data.source,
                "train_records": len(self.hop.sides[0]),
                "test_records": len(test),
                "secrets": sum(len(r.secrets()) for r in test),
                "task_questions": sum(q.task for r in test for q in r.questions),
            },
            **figures,
        }


def load(plan: AnyPlan, say: Say = lambda text: None, device: str | None = None) -> Evaluation:
    """Loads everything a run needs. Raises ``ValueError`` in one line for anything missing."""
    return (
        _load_graphs(plan, say, device)
        if isinstance(plan, MultihopConfig)
        else _load_hop(plan, say, device)
    )


def _load_hop(plan: EvalConfig, say: Say, device: str | None) -> Evaluation:
    model = load_backend(plan.model, device)
    guards = {g.name: load_guard(g, model) for g in plan.guards}
    encoder = model.encoder.asking(VALUE_ONLY) if plan.by_reply else model.encoder
    train, test = (encoder.encode(hops) for hops in hops_for(plan.data))
    if not train or not test:
        raise ValueError(
            f"{plan.data.source}: {len(train)} train and {len(test)} test records; "
            "both must be above 0"
        )
    fit_plain_guards(guards, model, train)
    scoring: Scoring = "said" if plan.by_reply else "exact"
    hop = HopSegments(model, guards, (train, test), plan.data, scoring=scoring)
    return Evaluation(Setup(plan, model, guards, say), plan, hop)


def _load_graphs(plan: MultihopConfig, say: Say, device: str | None) -> Evaluation:
    for a in plan.attacks:
        attack_class(a.attack)
        if a.lists:
            raise ValueError(
                f"attack {a.name!r} chooses from lists of candidates, which has another floor than "
                "the attacks over several hops: leave it out here, and run it hop by hop"
            )
    model = load_backend(plan.model, device)
    guards = {g.label: load_guard(g, model) for g in plan.guards}
    fit_plain_guards(guards, model, _some_records(plan, model))
    graphs = tuple(GraphSegments(model, guards, spec, plan.data) for spec in plan.topologies)
    return Evaluation(Setup(plan, model, guards, say), plan, None, graphs)


def _some_records(plan: MultihopConfig, model: HFBackend) -> list[TokenRecord]:
    """What the agents of the first topology read."""
    topology = topology_of(plan.topologies[0])
    some = scenarios_of(topology, plan.data, "coined", 64)
    plain = run_agents(HFAgents(model, "kv"), topology, some, model.encoder, ask=False)
    return [r for hop in plain.received.values() for r in hop.records]


def evaluate(
    plan: AnyPlan,
    out: Path,
    command: str,
    say: Say = lambda text: None,
    *,
    device: str | None = None,
    progress: Callable[[int], None] = lambda units: None,
    executor: str = "local",
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Runs or resumes an evaluation in ``out`` and writes its report there.

    ``progress`` is told how many units the journal holds; ``executor`` is one of
    ``executors.EXECUTORS``, and no part of the run: another may end it. ``tracker`` gets the
    report's figures. Raises ``ValueError`` where ``out`` holds a run with another configuration.
    """
    folder = RunFolder(out)
    folder.check(plan)  # before the model is loaded
    check_fresh(plan)
    with executor_of(executor) as side_by_side:
        made = load(plan, say, device)
        made = replace(made, setup=replace(made.setup, executor=side_by_side))
        now = run_manifest(command, list(plan.seeds), plan)
        guards = {name: guard.digest for name, guard in made.setup.guards.items()}
        now["hashes"] |= {"data": made.data_digest(), "guards": guards}
        folder.start(plan, now)
        timing = made.hop.timing if made.hop else {}
        timing.update(folder.timing())

        def after() -> None:
            folder.resumed(now)
            if made.hop:
                folder.save_timing(timing)
            progress(len(journal))

        tags = {f"lcguard.guard_digest.{name}": guards[name] for name in guards}
        tags["lcguard.model_digest"] = made.setup.model.digest
        with track(tracker, out, "eval", asdict(plan), tags, say) as tracked:
            with RunJournal(folder.journal_file, after) as journal:
                progress(len(journal))
                report = report_of(made, journal, folder)
            write_report(report, out)
            track_report(tracked, report)
    return report


def from_journal(folder: RunFolder, device: str | None = None) -> dict[str, Any]:
    """The report of a finished run; nothing is fitted.

    Raises ``ValueError`` naming what is missing.
    """
    if folder.manifest() is None:
        raise ValueError(
            f"{folder.path}: no manifest.json, so nobody knows where the figures come from; write "
            f"it with `lcguard eval resume {folder.path}`"
        )
    made = load(folder.config(), device=device)
    if made.hop:
        made.hop.timing.update(folder.timing())
    journal = FinishedJournal(folder.journal_file)
    with journal:
        report = report_of(made, journal, folder)
    missing = journal.missing
    if missing:
        first = ", ".join(str(missing[0][k]) for k in ("kind", "guard", "policy", "attack", "seed"))
        raise ValueError(
            f"{folder.path}: {len(missing)} units are missing, such as ({first}); end the run with "
            f"`lcguard eval resume {folder.path}`"
        )
    return report


def report_of(made: Evaluation, journal: Journal, folder: RunFolder) -> dict[str, Any]:
    """The report of a run; what its journal lacks is done now."""
    figures = made.figures(journal, folder)
    attempts = journal.attempts()
    errors, budget = sum(a.outcome is Outcome.ERROR for a in attempts), made.plan.error_budget
    where = folder.manifest() or {}
    sources = {m["hashes"]["source"] for m in [where, *where.get("resumed", [])]}
    warnings = [OVER.format(errors, budget)] if errors > budget else []
    warnings += [QUICK] if made.plan.quick else []
    warnings += [CHANGED] if len(sources) > 1 else []
    found = {
        "schema_version": SCHEMA_VERSION,
        "title": made.plan.title,
        **where,
        "journal": {"units": len(journal), "attempts": len(attempts)},
        "errors": {"attempts": errors, "budget": budget, "exceeded": errors > budget},
        **figures,
        "notes": [*warnings, *(NOTES if made.hop else GRAPH_NOTES)],
    }
    return Report.of(found).plain()


OVER = (
    "{} attempts ended in an error, and the budget is {}: they count for nobody, so the figures "
    "below rest on fewer attempts than were made. Repair the attack and run again."
)
QUICK = (
    "This is a quick run, with few records and short attacks: it shows what a report looks like, "
    "and judges no guard."
)
CHANGED = (
    "This run was interrupted and went on with other code of lcguard: some units are of the one "
    "and some of the other (the manifest has both hashes)."
)
NOTES = (
    "Fresh ASR: attackers fitted from scratch after the guard was frozen, on guarded segments of "
    "their own records, knowing the guard; the best of them, mean over categories, exact match.",
    "Training-time ASR is what the attacker that a guard was trained against recovers in the end. "
    "It is not a privacy figure; it stands here to show how far it can lie.",
    "Floor: the same attack fitted and scored on segments of other records. Ceiling: on raw KV.",
    "Utility: share of task questions answered exactly, greedy decoding, from the segment alone.",
)
GRAPH_NOTES = (
    "ASR: best of the attacks fitted from scratch after the guard was frozen, on guarded runs of "
    "the attackers' own scenarios; mean over categories, exact match.",
    "Edge: the receiver of one hop. Graph: somebody who reads every segment; a secret counts once "
    "any segment gives it away. Gap: graph minus the worst edge.",
    "Composed: a secret of two parts held by two agents; by one edge the other part is guessed "
    "blind.",
    "Latency against text counts reading alone, not the writing of text messages, on long "
    "contexts; below 1 is faster than text.",
)
