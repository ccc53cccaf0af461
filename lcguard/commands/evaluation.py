"""What ``lcguard eval`` does: run, resume, report again; with progress and exit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcguard.commands.progress import progress
from lcguard.evaluation.compare import FIGURES, Comparison, read_report
from lcguard.evaluation.fail_if import FailIf, parse_fail_if
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.main_table import main_table, shown
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.presets import AnyPlan, load_evaluation
from lcguard.evaluation.quick import quickened
from lcguard.evaluation.report import write_report
from lcguard.evaluation.results import Report
from lcguard.evaluation.run import evaluate, from_journal
from lcguard.evaluation.stress import stressed
from lcguard.tracking import Tracker

FORMATS = ("table", "md", "json", "html")
VIOLATED_EXIT, ERRORS_EXIT = 3, 4
"""Exit codes: a ``--fail-if`` was true; more attempts ended in an error than the budget allows."""
_NO_GATE = "--fail-if says nothing of a quick run, which judges no guard: run without --quick"


def run(
    plan: AnyPlan,
    out: Path,
    command: str,
    console: Console,
    *,
    device: str | None = None,
    fail_if: Sequence[str] = (),
    executor: str = "local",
    tracker: Tracker | None = None,
) -> int:
    """Runs or resumes; the exit code.

    Raises ``ValueError``, before anything is run, for a condition that cannot be judged.
    """
    conditions = read_conditions(fail_if)
    if plan.quick and conditions:
        raise ValueError(_NO_GATE)
    for condition in conditions:
        condition.check_guards(list(dict.fromkeys(g.name for g in plan.guards)))
    with progress(console, plan.units) as (say, advance):
        report = evaluate(
            plan,
            out,
            command,
            say,
            device=device,
            progress=advance,
            executor=executor,
            tracker=tracker,
        )
    return judge(report, conditions, console)


def load(
    config: Path,
    sets: Sequence[str],
    data: Path | None,
    stress: bool = False,
    quick: bool = False,
) -> AnyPlan:
    """A configuration from a file or a preset. Raises ``ValueError`` for anything wrong with it."""
    plan = load_evaluation(config, sets, data)
    if not (stress or quick):
        return plan
    if stress and quick:
        raise ValueError("--stress takes longer and --quick is shorter: leave one of them out")
    if not isinstance(plan, EvalConfig):
        option = "--stress" if stress else "--quick"
        raise ValueError(f"{config}: {option} is for evaluations of one hop; leave it out")
    return stressed(plan) if stress else quickened(plan)


def rerender(
    path: Path, form: str, device: str | None = None, stored: bool = False
) -> dict[str, Any]:
    """Makes a finished run's report again, from its journal, without fitting anything.

    With ``stored``, or where no journal is left, the figures of ``report.json`` stay as they are
    and Markdown and HTML are drawn again.

    Raises ``ValueError`` naming what is missing where the run is not finished.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is unknown: use {', '.join(FORMATS)}")
    folder = RunFolder(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a run's, as `lcguard eval list` shows them")
    if stored or not (folder.journal_file.exists() and folder.config_file.exists()):
        report = folder.report()
    else:
        report = from_journal(folder, device)
    write_report(report, path)
    return report


def read_conditions(texts: Sequence[str]) -> list[FailIf]:
    """Raises ``ValueError`` for an expression that cannot be read."""
    return [parse_fail_if(text) for text in texts]


def judge(found: Report | Mapping[str, Any], conditions: Sequence[FailIf], console: Console) -> int:
    """Prints what is wrong, one line each; the exit code.

    Raises ``ValueError`` for conditions on a quick run.
    """
    report, code = Report.of(found), 0
    if conditions and any(row.quick for row in report.results):
        raise ValueError(_NO_GATE)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    errors = report.errors
    if errors and errors.exceeded:
        say(f"errors: {errors.attempts} attempts ended in an error, the budget is {errors.budget}")
        code = ERRORS_EXIT
    for condition in conditions:
        for line in condition.violations(report):
            say(f"violated: {line}")
            code = VIOLATED_EXIT
    return code


def result_table(report: Report) -> Table:
    """A report's main figures."""
    found = main_table(report)
    table = Table(*found.headers, title=str(report.title))
    for row in found.rows:
        table.add_row(*row)
    return table


def comparison_table(found: Comparison) -> Table:
    """Each figure before and after, with its difference; marks what got worse."""
    table = Table(title=" -> ".join(dict.fromkeys(found.titles)))
    for name in ("guard", *FIGURES, "ASR intervals", "note"):
        table.add_column(name)
    for row in found.guards:
        cells = []
        for move in row.moves.values():
            change = "" if move.difference is None else f" ({move.difference:+.3f})"
            worse = " WORSE" if move.worse else ""
            cells.append(f"{shown(move.before)} -> {shown(move.after)}{change}{worse}")
        overlap = {None: "-", True: "overlap", False: "apart"}[row.moves["asr"].overlap]
        table.add_row(row.guard, *cells, overlap, row.note)
    return table


def rendered(path: Path, form: str) -> str | Table:
    """A run's report as it lies in its folder, in one of ``FORMATS``."""
    if form != "table":
        return (path / f"report.{form}").read_text(encoding="utf-8")
    return result_table(read_report(path))
