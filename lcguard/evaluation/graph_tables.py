"""The tables of a report over several hops."""

from __future__ import annotations

from lcguard.evaluation.results import AgentPoint, GuardRow, HopPoint, Report
from lcguard.evaluation.tables import Table

Pair = tuple[float, float] | None


def graph_tables(report: Report) -> list[Table]:
    """The main table first."""
    names = sorted({name for r in report.results for name in r.asr_graph_by_attack})
    main = Table(
        "Guards over several hops",
        (
            "Topology",
            "Guard",
            "Variant",
            "Utility",
            "ASR, worst edge",
            "ASR, graph [95%]",
            "Best attack",
            "Floor",
            "Gap",
            "Composed ASR, edge",
            "Composed ASR, graph",
            "Latency vs text",
        ),
        [_main_row(r) for r in report.results],
    )
    edges = Table(
        "By edge and path",
        ("Topology", "Guard", "Edge or path", "ASR", "Attack", "Utility"),
        [
            (
                str(r.topology),
                f"{r.guard}/{r.variant}",
                name,
                _f(e.asr, e.ci),
                str(e.attack),
                _f(r.utility_by_edge.get(name)),
            )
            for r in report.results
            for name, e in {**r.asr_by_edge, **r.asr_by_path}.items()
        ],
    )
    attacks = Table(
        "Graph ASR by attack",
        ("Topology", "Guard", *names),
        [
            (
                str(r.topology),
                f"{r.guard}/{r.variant}",
                *(_f(r.asr_graph_by_attack.get(name)) for name in names),
            )
            for r in report.results
        ],
        "A dash: not run, since a cheaper attack had broken the guard already.",
    )
    return [main, edges, attacks, *_curve_tables(report)]


def _main_row(r: GuardRow) -> tuple[str, ...]:
    return (
        str(r.topology),
        r.guard,
        str(r.variant),
        _of(r),
        _f(r.asr_edge_max),
        _f(r.asr_graph, r.asr_graph_ci),
        str(r.asr_graph_best),
        _f(r.floor),
        _f(r.gap),
        _f(r.composed.edge_max),
        _f(r.composed.graph),
        "-" if r.latency_vs_text is None else f"{r.latency_vs_text:.2f}x",
    )


def _curve_tables(report: Report) -> list[Table]:
    hops = Table(
        "By number of hops (chain)",
        ("Guard", "Hop", "Utility", "ASR at this hop", "ASR up to it"),
        [
            (p.guard, str(p.hops), _of(p), _f(p.asr_edge), _f(p.asr_path))
            for p in report.curves.hops
        ],
    )
    agents = Table(
        "By number of agents (hierarchy)",
        ("Guard", "Agents", "Utility", "ASR, graph", "Composed ASR", "Composed secrets"),
        [
            (
                p.guard,
                str(p.agents),
                _of(p),
                _f(p.asr_graph),
                _f(p.asr_composed),
                str(p.composed_secrets),
            )
            for p in report.curves.agents
        ],
    )
    return [t for t in (hops, agents) if t.rows]


def _of(found: GuardRow | HopPoint | AgentPoint) -> str:
    return f"{_f(found.utility)} of {_f(found.utility_vanilla)}"


def _f(value: float | None, pair: Pair = None) -> str:
    shown = "-" if value is None else f"{value:.3f}"
    return shown if pair is None else f"{shown} [{pair[0]:.3f}, {pair[1]:.3f}]"
