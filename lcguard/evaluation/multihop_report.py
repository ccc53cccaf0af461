"""The report of a run over several hops: rows, curves, latency; JSON, Markdown, HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcguard.agents.latency import latency
from lcguard.evaluation.curves import curves
from lcguard.evaluation.folder import RunFolder, RunJournal
from lcguard.evaluation.hashing import digest
from lcguard.evaluation.manifest import run_manifest
from lcguard.evaluation.multihop import MultihopRunner, load, row_of
from lcguard.evaluation.multihop_plan import MultihopConfig
from lcguard.evaluation.pages import html_page, markdown_page
from lcguard.evaluation.report import write_text_files
from lcguard.evaluation.segments import scenarios_of, topology_of
from lcguard.evaluation.tables import Table

NOTES = (
    "ASR: best of the attacks fitted from scratch after the guard was frozen, on guarded runs of "
    "the attackers' own scenarios; mean over categories, exact match.",
    "Edge: the receiver of one hop. Graph: somebody who reads every segment; a secret counts once "
    "any segment gives it away. Gap: graph minus the worst edge.",
    "Composed: a secret of two parts held by two agents; by one edge the other part is guessed "
    "blind.",
    "Latency against text counts reading alone, not the writing of text messages, on long "
    "contexts; below 1 is faster than text.",
)


def evaluate_multihop(
    config: MultihopConfig,
    out: Path,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    progress: Callable[[int], None] = lambda units: None,
) -> dict[str, Any]:
    """Runs or resumes an evaluation over several hops in ``out`` and writes its report there.

    Raises ``ValueError`` where ``out`` holds a run with another configuration.
    """
    folder = RunFolder(out, MultihopConfig)
    folder.check(config)
    model, guards = load(config, device)
    now = run_manifest(command, list(config.seeds), config)
    digests = {name: guard.digest for name, guard in guards.items()}
    now["hashes"] |= {"data": _data_digest(config), "guards": digests}
    manifest = folder.start(config, now)

    def after() -> None:
        folder.resumed(now)
        progress(len(journal))

    with RunJournal(folder.journal_file, after) as journal:
        runner = MultihopRunner(config, model, guards, journal, say)
        report = report_of(runner, folder)
    report = {"title": config.title, **(folder.manifest() or manifest), **report}
    write(report, out)
    return report


def _data_digest(config: MultihopConfig) -> str:
    """Sha256 of all contexts: what attackers are fitted on and what is measured."""
    texts = []
    for spec in config.topologies:
        topology, d = topology_of(spec), config.data
        for split, n, seed in (("coined", d.train_scenarios, 0), ("test", d.test_scenarios, 1)):
            made = scenarios_of(topology, d, split, n, seed)
            texts.append([r.text for s in made for a in s.agents for r in a.records])
    return digest(texts)


def report_of(runner: MultihopRunner, folder: RunFolder) -> dict[str, Any]:
    """Runs what is missing; the figures."""
    c = runner.c
    rows = []
    for spec in c.topologies:
        g = runner.graph(spec)
        # the cheapest guards to judge first: identity says what the attackers are worth
        for guard in c.guards:
            row = row_of(runner, g, guard)
            if c.latency.runs:
                measured = _latency(runner, folder, g.topology.name, guard.label, spec)
                row["latency_vs_text"] = measured["guarded_ms"] / measured["text_ms"]
                row["latency"] = measured
            rows.append(row)
    attempts = runner.journal.attempts()
    errors = sum(r["errors"] for r in rows)
    return {
        "results": rows,
        "curves": curves(runner),
        "errors": {"attempts": errors, "budget": c.error_budget,
                   "exceeded": errors > c.error_budget},
        "journal": {"units": len(runner.journal), "attempts": len(attempts)},
        "notes": list(NOTES),
    }  # fmt: skip


def _latency(
    runner: MultihopRunner, folder: RunFolder, topology: str, guard: str, spec: Any
) -> dict[str, Any]:
    """Measured once a run and kept: a resumed run reports the same."""
    name = f"latency {topology} {guard}"
    known = folder.timing()
    if name not in known:
        found = latency(
            runner.model, topology_of(spec), runner.guards[guard], runner.c.latency.runs,
            runner.c.latency.context_tokens,
        )  # fmt: skip
        known[name] = {k: float(v) for k, v in asdict(found).items()}
        folder.save_timing(known)
    return dict(known[name])


def write(report: Mapping[str, Any], folder: Path) -> None:
    """``report.json``, ``report.md`` and ``report.html``, each in one step."""
    title = str(report.get("title"))
    found = tables(report)
    write_text_files(
        folder,
        {
            "report.json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
            "report.md": markdown_page(title, found, report),
            "report.html": html_page(title, found, report),
        },
    )


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The main table first."""
    rows = report["results"]
    main = Table(
        "Guards over several hops",
        ("Topology", "Guard", "Variant", "Utility", "ASR, worst edge", "ASR, graph [95%]",
         "Best attack", "Floor", "Gap", "Composed ASR, edge", "Composed ASR, graph",
         "Latency vs text"),
        [
            (
                r["topology"], r["guard"], r["variant"],
                f"{_f(r['utility'])} of {_f(r['utility_vanilla'])}", _f(r["asr_edge_max"]),
                _f(r["asr_graph"]) + _ci(r["asr_graph_ci"]), str(r["asr_graph_best"]),
                _f(r["floor"]), _f(r["gap"]), _f(r["composed"]["edge_max"]),
                _f(r["composed"]["graph"]),
                "-" if r["latency_vs_text"] is None else f"{r['latency_vs_text']:.2f}x",
            )
            for r in rows
        ],
    )  # fmt: skip
    edges = Table(
        "By edge and path",
        ("Topology", "Guard", "Edge or path", "ASR", "Attack", "Utility"),
        [
            (r["topology"], f"{r['guard']}/{r['variant']}", name, _f(e["asr"]) + _ci(e["ci"]),
             str(e["attack"]), _f(r["utility_by_edge"].get(name)))
            for r in rows
            for name, e in {**r["asr_by_edge"], **r["asr_by_path"]}.items()
        ],
    )  # fmt: skip
    names = sorted({name for r in rows for name in r["asr_graph_by_attack"]})
    attacks = Table(
        "Graph ASR by attack",
        ("Topology", "Guard", *names),
        [
            (r["topology"], f"{r['guard']}/{r['variant']}",
             *(_f(r["asr_graph_by_attack"].get(name)) for name in names))
            for r in rows
        ],
        "A dash: not run, since a cheaper attack had broken the guard already.",
    )  # fmt: skip
    return [main, edges, attacks, *_curve_tables(report.get("curves") or {})]


def _curve_tables(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    hops = Table(
        "By number of hops (chain)",
        ("Guard", "Hop", "Utility", "ASR at this hop", "ASR up to it"),
        [
            (p["guard"], str(p["hops"]), f"{_f(p['utility'])} of {_f(p['utility_vanilla'])}",
             _f(p["asr_edge"]), _f(p["asr_path"]))
            for p in found.get("hops", [])
        ],
    )  # fmt: skip
    agents = Table(
        "By number of agents (hierarchy)",
        ("Guard", "Agents", "Utility", "ASR, graph", "Composed ASR", "Composed secrets"),
        [
            (p["guard"], str(p["agents"]), f"{_f(p['utility'])} of {_f(p['utility_vanilla'])}",
             _f(p["asr_graph"]), _f(p["asr_composed"]), str(p["composed_secrets"]))
            for p in found.get("agents", [])
        ],
    )  # fmt: skip
    return [t for t in (hops, agents) if t.rows]


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ci(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f" [{pair[0]:.3f}, {pair[1]:.3f}]"
