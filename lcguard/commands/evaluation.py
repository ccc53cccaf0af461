"""What ``lcguard eval`` does: run, resume, report again; with progress, gates and exit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcguard.commands.progress import progress
from lcguard.evaluation.compare import FIGURES, Comparison
from lcguard.evaluation.fail_if import Gate, parse_gate
from lcguard.evaluation.folder import FinishedJournal, RunFolder
from lcguard.evaluation.kinds import KINDS, Kind, kind_for, kind_of, shown
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.setup import load_plan, preset, report_of, setup
from lcguard.evaluation.stress import stressed
from lcguard.evaluation.verdict import mapping

FORMATS = ("table", "md", "json", "html")
GATE_EXIT, ERRORS_EXIT = 3, 4
"""Exit codes: a ``--fail-if`` was true; more attempts ended in an error than the budget allows."""


def run(
    config: Any,
    out: Path,
    command: str,
    console: Console,
    device: str | None = None,
    fail_if: Sequence[str] = (),
) -> int:
    """Runs or resumes; the exit code.

    Raises ``ValueError`` for a gate that cannot be judged before anything is run.
    """
    kind = kind_for(config)
    gates = read_gates(fail_if)
    for gate in gates:
        gate.check_guards(list(dict.fromkeys(g.name for g in config.guards)))
    with progress(console, kind.units(config)) as (say, advance):
        report = kind.evaluate(config, out, command, say, device, advance)
    return judge(report, gates, console)


def load_evaluation(
    config: Path, sets: Sequence[str], data: Path | None, stress: bool = False
) -> Any:
    """A configuration of the kind that its file says it is, from a file or a preset.

    Raises ``ValueError`` in one line for anything wrong with it.
    """
    path = config if config.suffix else preset(str(config))
    kind = kind_of(path)
    plan = load_plan(kind.schema, path, sets, data)
    if not stress:
        return plan
    if not isinstance(plan, EvalConfig):
        raise ValueError(f"{config}: --stress is for evaluations of one hop; leave it out")
    return stressed(plan)


def load_started(path: Path) -> Any:
    """The configuration that a folder's run was started with."""
    return RunFolder(path, started_kind(path).schema).config()


def started_kind(path: Path) -> Kind:
    """The kind of a folder's run; one hop where no configuration is left."""
    file = RunFolder(path).config_file
    return kind_of(file) if file.exists() else KINDS["hop"]


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
    kind = started_kind(path)
    stored = stored or not (folder.journal_file.exists() and folder.config_file.exists())
    if stored or kind.schema is not EvalConfig:
        report = folder.report()
    else:
        report = _from_journal(folder, device)
    kind.write(report, path)
    return report


def _from_journal(folder: RunFolder, device: str | None) -> dict[str, Any]:
    manifest = folder.manifest()
    if manifest is None:
        raise ValueError(
            f"{folder.path}: no manifest.json, so nobody knows where the figures come from; write "
            f"it with `lcguard eval resume {folder.path}`"
        )
    made = setup(folder.config(), lambda text: None, device)
    made.timing.update(folder.timing())
    journal = FinishedJournal(folder.journal_file)
    with journal:
        report = report_of(made, journal, lambda: manifest)
    missing = journal.missing
    if missing:
        first = ", ".join(str(missing[0][k]) for k in ("kind", "guard", "policy", "attack", "seed"))
        raise ValueError(
            f"{folder.path}: {len(missing)} units are missing, such as ({first}); end the run with "
            f"`lcguard eval resume {folder.path}`"
        )
    return report


def read_gates(texts: Sequence[str]) -> list[Gate]:
    """Raises ``ValueError`` for an expression that cannot be read."""
    return [parse_gate(text) for text in texts]


def judge(report: Mapping[str, Any], gates: Sequence[Gate], console: Console) -> int:
    """Prints what is wrong, one line each; the exit code."""
    code = 0
    errors = mapping(report.get("errors"))
    if errors.get("exceeded"):
        console.print(
            f"errors: {errors['attempts']} attempts ended in an error, the budget is "
            f"{errors['budget']}", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        code = ERRORS_EXIT
    for gate in gates:
        for line in gate.violations(report):
            console.print(f"violated: {line}", highlight=False, markup=False, soft_wrap=True)
            code = GATE_EXIT
    return code


def result_table(report: Mapping[str, Any], kind: Kind) -> Table:
    """A report's main figures."""
    found = kind.table(report)
    table = Table(*found.headers, title=str(report.get("title")))
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
    return result_table(RunFolder(path).report(), started_kind(path))
