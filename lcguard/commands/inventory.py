"""``lcguard eval list``: which runs there are, and what an evaluation can be made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lcguard.agents.models import NAMED
from lcguard.attacks.base import BROKEN, attack_class
from lcguard.attacks.base import names as attack_names
from lcguard.config import read_mapping
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.presets import EMBEDDED, shipped
from lcguard.evaluation.results import Report
from lcguard.guards import guard_class
from lcguard.guards import names as guard_names


@dataclass(frozen=True)
class RunEntry:
    """One folder that holds a run."""

    path: Path
    title: str
    state: str
    """``complete``, ``running``, ``interrupted`` or ``damaged``, with the units journaled."""
    guards: tuple[str, ...]
    best: tuple[float, str] | None
    """Lowest fresh ASR, and the guard that has it."""
    date: str


def find_runs(root: Path) -> list[RunEntry]:
    """Runs in ``root`` and one level below, newest first.

    Raises ``ValueError`` where ``root`` is no folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name where runs are with --runs")
    folders = [p for p in (root, *root.glob("*"), *root.glob("*/*")) if p.is_dir()]
    found = [entry for folder in folders if (entry := _entry(RunFolder(folder))) is not None]
    return sorted(found, key=lambda e: e.date, reverse=True)


def run_table(entries: list[RunEntry], root: Path) -> Table:
    table = Table()
    for name in ("run", "title", "state", "guards", "lowest fresh ASR", "date"):
        table.add_column(name)
    for e in entries:
        best = "-" if e.best is None else f"{e.best[0]:.3f} ({e.best[1]})"
        where = "." if e.path == root else e.path.relative_to(root).as_posix()
        table.add_row(where, e.title, e.state, ", ".join(e.guards), best, e.date)
    return table


def _entry(folder: RunFolder) -> RunEntry | None:
    report_file = folder.path / "report.json"
    if not folder.journal_file.exists() and not report_file.exists():
        return None
    report, title = _report(report_file), ""
    guards: tuple[str, ...] = ()
    state = _state(folder, report)
    if folder.config_file.exists():
        try:
            config = read_mapping(folder.config_file)
            title = str(config.get("title", ""))
            guards = tuple(str(g["name"]) for g in config.get("guards", ()))
        except (ValueError, TypeError, KeyError):
            state = f"damaged config.yaml; {state}"
    rows = report.results if report else ()
    created = report.created if report else _json(folder.path / "manifest.json").get("created")
    scored = [(value, row.label) for row in rows if (value := row.headline[0]) is not None]
    return RunEntry(
        folder.path,
        (report.title if report else None) or title,
        state,
        tuple(dict.fromkeys(row.guard for row in rows)) or guards,
        min(scored) if scored else None,
        str(created or ""),
    )


def _state(folder: RunFolder, report: Report | None) -> str:
    if not folder.journal_file.exists():
        return "complete, no journal"
    units = count_units(folder.journal_file)
    known = report.journal.get("units") if report else None
    # reports of before the count was kept: a report is written at the end alone
    complete = report is not None and (known is None or known == units)
    word = (
        "complete" if complete else ("running" if _locked(folder.journal_file) else "interrupted")
    )
    return f"{word}, {units} units"


def count_units(journal: Path) -> int:
    """Commit lines of a journal, which another process may be writing."""
    with journal.open("rb") as file:
        return sum(_commit(line) for line in file)


def _commit(line: bytes) -> bool:
    try:
        return bool(json.loads(line)["type"] == "commit")
    except (ValueError, KeyError, TypeError):
        return False  # a torn last line


def _locked(path: Path) -> bool:
    """Does a process hold the journal's lock? Read off the kernel's list: trying would disturb."""
    try:
        held = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    inode = os.stat(path).st_ino
    return any(f":{inode} " in line and "FLOCK" in line for line in held.splitlines())


def _report(path: Path) -> Report | None:
    """None where there is none that can be read."""
    try:
        return Report.of(_json(path)) if path.exists() else None
    except ValueError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- what is registered


def attack_table() -> Table:
    table = Table("attack", "goal", "access", "fitted", "reference", "from")
    for name in attack_names():
        cls = attack_class(name)
        origin = "built in" if cls.__module__.startswith("lcguard.") else cls.__module__
        fitted = "yes" if cls.fitted else "no"
        table.add_row(name, cls.goal, cls.access, fitted, cls.reference, origin)
    return table


def broken_plugins() -> Iterator[str]:
    """One line per plugin that cannot be used."""
    attack_names()
    for plugin, why in BROKEN.items():
        yield f"attack plugin {plugin} is broken: {why}"


def guard_table() -> Table:
    table = Table("guard", "trained", "needs spans", "claim")
    for name in guard_names():
        cls = guard_class(name)
        table.add_row(
            name, "yes" if cls.trained else "no", "yes" if cls.needs_twin else "no", cls.claim
        )
    return table


_COMMANDS = {"train-": "train", "detect-": "detect train"}
"""What runs a preset, by the beginning of its name; others are evaluations."""


def preset_table() -> Table:
    table = Table("preset", "command", "title")
    for model in NAMED:
        for path in shipped(model):
            found = read_mapping(path)
            prefix = next((p for p in _COMMANDS if path.stem.startswith(p)), "")
            name = path.stem.removeprefix(prefix)
            command = f"lcguard {_COMMANDS.get(prefix, 'eval run')} {name}"
            if model != EMBEDDED:
                command += f" --set model={model}"
            guard = found.get("train", {}).get("guard", name)
            title = found.get("title") or f"trains {guard}"
            table.add_row(path.stem, command, str(title))
    return table
