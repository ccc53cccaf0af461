"""What ``lcguard eval`` does: run, resume, report again; with progress, gates and exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lcguard.commands.compose import evaluate, load_plan, preset, report_of, setup
from lcguard.commands.gate_expression import Gate, parse_gate
from lcguard.commands.multihop import evaluate_multihop
from lcguard.commands.stress import stressed
from lcguard.config import read_mapping
from lcguard.evaluation.compare import FIGURES, Comparison
from lcguard.evaluation.folder import FinishedJournal, RunFolder
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.plan import EvalConfig, PolicySpec
from lcguard.evaluation.report import to_html, to_markdown, write_report
from lcguard.evaluation.verdict import mapping, number, records

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
) -> tuple[dict[str, Any], int]:
    """Runs or resumes; the report and the exit code.

    Raises ``ValueError`` for a gate that cannot be judged before anything is run.
    """
    kind = next(k for k in KINDS.values() if isinstance(config, k.schema))
    gates = read_gates(fail_if)
    for gate in gates:
        gate.check_guards([g.name for g in config.guards])
    with progress(console, kind.units(config)) as (say, advance):
        report = kind.evaluate(config, out, command, say, device, advance)
    return report, judge(report, gates, console)


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
    folder = RunFolder(path)
    if folder.config_file.exists():
        folder = RunFolder(path, kind_of(folder.config_file).schema)
    return folder.config()


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
    stored = stored or not (folder.journal_file.exists() and folder.config_file.exists())
    if stored or kind_of(folder.config_file).schema is not EvalConfig:
        report = folder.report()
    else:
        report = _from_journal(folder, device)
    write_report(report, path)
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


COLUMNS = {
    "utility": "utility",
    "training-time ASR": "asr_train",
    "fresh ASR": "asr_fresh",
    "injection": "asr_injection",
    "floor": "floor",
    "ceiling": "ceiling",
}


def result_table(report: Mapping[str, Any]) -> Table:
    """A report's main figures; errors get a column of their own."""
    table = Table(title=str(report.get("title")))
    for name in ("guard", *COLUMNS, "errors"):
        table.add_column(name)
    for row in records(report.get("results")):
        ci = row.get("asr_fresh_ci")
        cells = [shown(row.get(key)) for key in COLUMNS.values()]
        if isinstance(ci, list | tuple) and len(ci) == 2:
            cells[2] += f" [{shown(ci[0])}, {shown(ci[1])}]"
        table.add_row(str(row.get("guard")), *cells, str(mapping(row.get("counts")).get("error")))
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


def rendered(report: Mapping[str, Any], form: str) -> str | Table:
    """The report in one of ``FORMATS``."""
    if form == "md":
        return to_markdown(report)
    if form == "html":
        return to_html(report)
    if form == "json":
        return json.dumps(report, indent=2, ensure_ascii=False)
    return result_table(report)


def shown(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.3f}"


# -- kinds and progress


@dataclass(frozen=True)
class Kind:
    """What a configuration's top-level key ``kind`` stands for."""

    schema: type[Any]
    """A frozen dataclass with ``guards``; kinds other than the default have a field ``kind``."""
    evaluate: Callable[..., dict[str, Any]]
    """``(config, out, command, say, device, progress) -> report``, as ``compose.evaluate``."""
    units: Callable[[Any], int]
    """How many units a run makes at most."""


def planned_units(config: EvalConfig) -> int:
    """Units at most: fewer are made where the first attack breaks a guard."""
    seeds = len(config.seeds)
    total = seeds + 1  # floors, and the unguarded receiver
    for guard in config.guards:
        total += seeds * (1 + int(config.injection) + (len(guard.attacks) or len(config.attacks)))
    chosen = len(config.policy_attacks) or len(config.attacks)
    extra: list[PolicySpec] = [*config.policies, *([config.derived] if config.derived else [])]
    return total + sum(1 + seeds * (1 + (chosen if p.forbid else 0)) for p in extra)


@contextmanager
def progress(
    console: Console, total: int
) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Ways to say a line and to say how many units are done: a bar on a terminal, none in CI."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal or os.environ.get("CI"):
        yield say, lambda units: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("units at most"), TimeElapsedColumn())
    # No thread and no redirection: attacks run in forked children, which would inherit its locks.
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False,
        redirect_stdout=False, redirect_stderr=False,
    ) as bar:  # fmt: skip
        task = bar.add_task("units", total=total)
        yield say, lambda units: bar.update(task, completed=units, refresh=True)


def planned_hop_units(config: MultihopConfig) -> int:
    """Units of a run over several hops, at most."""
    per_guard = 1 + len(config.attacks)
    seeds, graphs = len(config.seeds), len(config.topologies)
    curves = 4 * len(config.curves.guards) if config.curves.attack else 0
    return graphs * (1 + seeds * (1 + len(config.guards) * per_guard)) + curves


KINDS = {
    "hop": Kind(EvalConfig, evaluate, planned_units),
    "multihop": Kind(MultihopConfig, evaluate_multihop, planned_hop_units),
}
"""``hop``, one hop at a time, is what a file is that names no kind."""


def kind_of(path: Path) -> Kind:
    """Raises ``ValueError`` naming the kinds there are."""
    name = read_mapping(path).get("kind", "hop")
    if name not in KINDS:
        raise ValueError(f"{path}: kind {name!r} is unknown; use one of: {', '.join(KINDS)}")
    return KINDS[name]
