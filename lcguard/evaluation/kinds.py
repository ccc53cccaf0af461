"""Kinds of evaluation: a configuration's top-level key ``kind`` says which it is.

A file without the key is one hop at a time. A kind brings its schema, how it is run, and how its
report is written and shown; everything else (folders, gates, lists, resuming) is common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcguard.config import read_mapping
from lcguard.evaluation import multihop_report
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.plan import EvalConfig, PolicySpec
from lcguard.evaluation.report import write_report
from lcguard.evaluation.setup import evaluate
from lcguard.evaluation.tables import Table
from lcguard.evaluation.verdict import LIST, from_list, interval, mapping, number, records, verdict


@dataclass(frozen=True)
class Kind:
    """What one value of ``kind`` stands for."""

    schema: type[Any]
    """A frozen dataclass with ``guards``; all kinds but the default have a field ``kind``."""
    evaluate: Callable[..., dict[str, Any]]
    """``(config, out, command, say, device, progress) -> report``."""
    units: Callable[[Any], int]
    """How many units a run makes at most."""
    write: Callable[[Mapping[str, Any], Path], object]
    """Writes a report's three files."""
    table: Callable[[Mapping[str, Any]], Table]
    """The report's main figures."""


def planned_units(config: EvalConfig) -> int:
    """Units at most: fewer are made where the first attack breaks a guard."""
    seeds = len(config.seeds)
    # floors, and the unguarded receiver
    total = seeds * (1 + sum(a.lists for a in config.attacks)) + 1
    for guard in config.guards:
        total += seeds * (1 + int(config.injection) + (len(guard.attacks) or len(config.attacks)))
    chosen = len(config.policy_attacks) or len(config.attacks)
    extra: list[PolicySpec] = [*config.policies, *([config.derived] if config.derived else [])]
    return total + sum(1 + seeds * (1 + (chosen if p.forbid else 0)) for p in extra)


COLUMNS = {
    "utility": "utility",
    "training-time ASR": "asr_train",
    "fresh ASR": "asr_fresh",
    "injection": "asr_injection",
    "floor": "floor",
    "ceiling": "ceiling",
}


def main_table(report: Mapping[str, Any]) -> Table:
    """One line a guard; errors have a column of their own."""
    listed = f"likelihood@{LIST}"
    table = Table(str(report.get("title")), ("guard", *COLUMNS, listed, "verdict", "errors"))
    for row in records(report.get("results")):
        cells = [shown(row.get(key)) for key in COLUMNS.values()]
        ci = interval(row.get("asr_fresh_ci"))
        if ci is not None:
            cells[2] += f" [{shown(ci[0])}, {shown(ci[1])}]"
        errors = mapping(row.get("counts")).get("error")
        picked = from_list(row)
        cells.append(shown(picked.get("asr")))
        if picked:
            cells[-1] += f" (chance {shown(picked.get('floor'))})"
        table.rows.append((str(row.get("guard")), *cells, verdict(row).word, str(errors)))
    return table


def shown(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.3f}"


def planned_hop_units(config: MultihopConfig) -> int:
    """Units of a run over several hops, at most."""
    per_guard = 1 + len(config.attacks)
    seeds, graphs = len(config.seeds), len(config.topologies)
    curves = 4 * len(config.curves.guards) if config.curves.attack else 0
    return graphs * (1 + seeds * (1 + len(config.guards) * per_guard)) + curves


KINDS = {
    "hop": Kind(EvalConfig, evaluate, planned_units, write_report, main_table),
    "multihop": Kind(
        MultihopConfig,
        multihop_report.evaluate_multihop,
        planned_hop_units,
        multihop_report.write,
        lambda report: multihop_report.tables(report)[0],
    ),
}


def kind_of(path: Path) -> Kind:
    """Of a configuration file. Raises ``ValueError`` naming the kinds there are."""
    name = read_mapping(path).get("kind", "hop")
    if name not in KINDS:
        raise ValueError(f"{path}: kind {name!r} is unknown; use one of: {', '.join(KINDS)}")
    return KINDS[name]


def kind_for(config: Any) -> Kind:
    """Of a loaded configuration."""
    return next(k for k in KINDS.values() if isinstance(config, k.schema))
