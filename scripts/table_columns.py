"""What the tables of README.md and docs/results.md show: a report in, a Markdown table out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lcguard.evaluation.results import LIST
from lcguard.evaluation.verdict import verdict

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Any], str]]
"""Heading -> what stands under it for one row of a report."""


def figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f" [{pair[0]:.3f}, {pair[1]:.3f}]"


def told(value: float | None, beside: Any, ci: str = "") -> str:
    return f"{figure(value)}{ci} ({beside})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def by(columns: Columns, rows: Sequence[Any]) -> str:
    if not rows:
        return "Not in these results."
    return table([*columns], [[show(row) for show in columns.values()] for row in rows])


def cell(key: str, digits: int = 3, ci: str = "") -> Callable[[Row], str]:
    """A figure, with its interval where there is one."""
    return lambda row: figure(row[key], digits) + interval(row.get(ci or f"{key}_ci"))


def plain(key: str) -> Callable[[Row], str]:
    return lambda row: figure(row[key])


def text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def of(key: str, whole: str) -> Callable[[Row], str]:
    """A figure, and what it is without a guard."""
    return lambda row: f"{figure(row[key])} of {figure(row[whole])}"


def listed(size: str) -> Callable[[Row], str]:
    """What the optimal attacker recovers who chooses from a list; the interval of the headline."""

    def of_row(row: Row) -> str:
        if (found := row.get("likelihood", {}).get(size)) is None:
            return "-"
        ci = interval(found["ci"]) if size == LIST else ""
        return told(found["asr"], figure(found["floor"]), ci)

    return of_row


UTILITY = {"utility": of("utility", "utility_vanilla")}
GUARDS: Columns = {
    "guard": text("guard"),
    **UTILITY,
    "training-time ASR": cell("asr_train"),
    "fresh ASR [95%]": cell("asr_fresh"),
    "best attack": text("asr_fresh_best"),
    "injection": cell("asr_injection"),
    "floor": plain("floor"),
    "ceiling": cell("ceiling"),
    "recovered / resisted": lambda r: f"{r['counts']['success']} / {r['counts']['resisted']}",
    "likelihood@10 (chance)": listed("10"),
    f"likelihood@{LIST} [95%] (chance)": listed(LIST),
    "verdict": lambda r: verdict(r).word,
}
HEADLINE = {
    "identity": "none (raw KV)",
    "gate": "`gate`, finds what the policy forbids",
    "redact": "`redact`, told what to hide (the default)",
}


def guards(report: Row) -> str:
    """The main table of a report."""
    return by(GUARDS, report["results"])


def headline(report: Row) -> str:
    """Three rows of it, for the README."""
    columns: Columns = {
        "guard": lambda r: HEADLINE[r["guard"]],
        "task answers right": UTILITY["utility"],
        "secrets recovered, best fresh attack [95%]": cell("asr_fresh"),
        f"value picked from {LIST} (chance)": listed(LIST),
        "verdict": lambda r: verdict(r).word,
    }
    rows = {r["guard"]: r for r in report["results"]}
    return by(columns, [rows[name] for name in HEADLINE])


def likelihood(report: Row) -> str:
    """The optimal attacker, list by list."""
    columns: Columns = {
        "guard": text("guard"),
        "candidates": lambda r: f"{r['size']:,}",
        "right [95%]": cell("asr", ci="ci"),
        "chance": cell("floor"),
        "blind": cell("blind"),
        "median rank": lambda r: f"{r['rank_median']:g}",
        "nats gained": cell("nats", 2),
        "secrets": text("n"),
    }
    rows = [
        {"guard": r["guard"], "size": int(size), **found}
        for r in report["results"]
        for size, found in r.get("likelihood", {}).items()
        if size.isdigit()
    ]
    return by(columns, rows)


def draws(report: Row) -> str:
    """Several draws of one record, averaged."""
    head = ("draws of one record", *(f"right of {int(n):,} [95%]" for n in report["lists"]))
    found = report["draws"]
    rows = [(str(n), *map(cell("asr", ci="ci"), sizes.values())) for n, sizes in found.items()]
    return table(head, [*rows, ("chance", *map(cell("floor"), found["1"].values()))])


def policies(report: Row) -> str:
    """One gate under several policies."""
    columns: Columns = {
        "policy of the gate": lambda p: f"forbid {p['policy']}",
        "task": of("utility", "utility_vanilla"),
        "allowed secrets": of("allowed_accuracy", "allowed_accuracy_vanilla"),
        "fresh ASR on forbidden [95%]": cell("asr_forbidden"),
        "floor": plain("floor"),
    }
    return by(columns, report["policies"])


def derived(report: Row) -> str:
    """Derived answers to values that may not be told."""
    columns: Columns = {
        "derived value allowed, exact value forbidden": text("source_category"),
        "derived answers right": of("accuracy", "accuracy_vanilla"),
        "fresh ASR of the exact value [95%]": cell("asr_exact"),
        "best guess knowing the derived value": cell("asr_exact_best_guess"),
    }
    return by(columns, report["derived"])


def certificate(report: Row) -> str:
    """What the certified guards' segments can tell at most."""
    columns: Columns = {
        "guard": text("guard"),
        "pair leak, mean": lambda c: f"{c['mean_nats']:.2f} nats",
        "95% upper bound": cell("upper_nats", 2),
        "median": cell("median_nats", 2),
        "99%": cell("p99_nats", 1),
        "largest": cell("max_nats", 1),
        "unguarded, same noise": cell("raw_nats", 0),
        "pairs": text("n_pairs"),
    }
    return by(columns, [{"guard": report["guard"], **report["certificate"]}])


def ceilings(report: Row) -> str:
    """How often one secret can be named at most, by how well it is guessed without the segment."""
    columns: Columns = {
        "secret": text("secret"),
        "guessed blind": cell("guess"),
        "ceiling": cell("ceiling"),
        "at most, 95%": lambda c: figure(math.ceil(c["upper"] * 1000) / 1000),  # a bound: up
        "secrets": text("secrets"),
    }
    found = report["certificate"]["secrets"]
    rows = [
        {"secret": f"any, one value in {1 / c['least_guess']:,.0f}", **c} for c in found["ceilings"]
    ]
    rows += [{"secret": name, **c} for name, c in found["by_category"].items()]
    listed = found["listed"]
    rows.append(
        {
            "secret": f"measured: picked from {listed['candidates']} candidates",
            "guess": listed["chance"],
            "ceiling": listed["asr"],
            "upper": listed["upper"],
            "secrets": listed["secrets"],
        }
    )
    return by(columns, rows)


def nano(report: Row) -> str:
    rows = [(k, figure(v), str(report["questions"][k])) for k, v in report["accuracy"].items()]
    return table(("questions", "exact match", "asked"), rows)


def search(report: Row) -> str:
    """Every setting of the published guard that was tried."""
    columns: Columns = {
        "width": text("bottleneck"),
        **{name: text(name) for name in ("beta", "steps", "lag", "objective")},
        "utility": cell("utility"),
        "training-time ASR": cell("asr_train"),
        "fresh ASR": lambda r: figure(max(r["asr_fresh"].values())),
    }
    return by(columns, report["runs"])


def multihop(report: Row) -> str:
    """Guards over several hops."""
    columns: Columns = {
        **{name: text(name) for name in ("topology", "guard", "variant")},
        **UTILITY,
        "ASR, worst edge": cell("asr_edge_max"),
        "ASR, graph [95%]": cell("asr_graph"),
        "best attack": text("asr_graph_best"),
        "floor": plain("floor"),
        "gap": cell("gap"),
        "composed ASR, edge -> graph": lambda r: (
            f"{figure(r['composed']['edge_max'])} -> {figure(r['composed']['graph'])}"
        ),
        "latency / text": cell("latency_vs_text", 2),
    }
    return by(columns, report["results"])


def attackers(report: Row) -> str:
    """What every attack recovers of unguarded KV, and of the gate's, on the first topology."""
    rows = [r for r in report["results"] if r["topology"] == report["results"][0]["topology"]]
    shown = [r for r in rows if r["guard"] in ("identity", "gate")]
    names = sorted({n for r in shown for n in r["asr_graph_by_attack"]})
    head = ("attack", *(f"{r['guard']}, {r['variant']}" for r in shown))
    body = [(n, *(figure(r["asr_graph_by_attack"].get(n)) for r in shown)) for n in names]
    return table(head, body)


def hops(report: Row) -> str:
    """Leakage against hops."""
    columns: Columns = {
        "guard": text("guard"),
        "hop": text("hops"),
        **UTILITY,
        "ASR at this hop": cell("asr_edge"),
        "ASR up to it": cell("asr_path"),
    }
    return by(columns, [p for p in report["curves"]["hops"] if p["hops"] in (1, 2, 4, 8)])


def agents(report: Row) -> str:
    """Leakage against agents."""
    columns: Columns = {
        "guard": text("guard"),
        "agents": text("agents"),
        **UTILITY,
        "ASR, graph": cell("asr_graph"),
        "composed ASR (secrets)": lambda p: (
            f"{figure(p['asr_composed'])} ({p['composed_secrets']})"
        ),
    }
    return by(columns, report["curves"]["agents"])


def detected(report: Row) -> str:
    """Values found whole and task spans touched, source by source, beside Presidio's."""
    columns: Columns = {
        "held-out text": text("source"),
        "values found": lambda r: f"{r['found']} of {r['total']}",
        "recall (at least, 95%)": lambda r: told(r["recall"], figure(r["recall_lower"])),
        "task spans touched": plain("task_touched"),
        "tokens hidden": plain("tokens_flagged"),
        "Presidio: recall / touched": lambda r: (
            f"{figure(r['presidio']['recall'])} / {figure(r['presidio']['task_touched'])}"
        ),
    }
    return by(columns, [{"source": name, **r} for name, r in report["held_out"].items()])


def own_category(report: Row) -> str:
    """What heads trained on few and on more examples find of names that they never saw."""
    rows = [
        {**measured, "examples": row["examples"], "cpu_s": row["cpu_s"]}
        for row in report["rows"]
        for measured in (
            {"source": "the examples themselves, in five parts", **row["held_out"]},
            *row["tests"],
        )
    ]
    columns: Columns = {
        "examples": text("examples"),
        "measured on": text("source"),
        "values found": lambda r: f"{r['found']} of {r['total']}" if r["total"] else "-",
        "recall (at least, 95%)": lambda r: (
            told(r["recall"], figure(r["recall_lower"])) if r["total"] else "-"
        ),
        "flagged beside values": lambda r: figure(
            r.get("others_flagged", r.get("examples_flagged"))
        ),
        "texts without any: flagged": lambda r: (
            f"{r['alarmed']} of {r['without']}" if "without" in r else "-"
        ),
        "seconds of one core": lambda r: figure(r["cpu_s"], 0),
    }
    return by(columns, rows)


def real(reports: Mapping[str, Row]) -> str:
    """The real model, text by text: the task, the best fresh attacker, the ceiling that recall
    puts on every other one, and Presidio on the same source's held-out text."""
    columns: Columns = {
        "text (SmolLM2)": text("source"),
        "task answers right: raw KV, `redact`, `twin`": lambda r: beside(r, "utility"),
        "secrets recovered, best fresh attack: raw KV": lambda r: figure(
            r["identity"]["asr_fresh"]
        ),
        "`twin` [95%] (floor)": lambda r: told(
            r["twin"]["asr_fresh"], figure(r["twin"]["floor"]), interval(r["twin"]["asr_fresh_ci"])
        ),
        "values found by `twin` / task spans touched": lambda r: recall_touched(
            r["twin"]["detection"]
        ),
        "no attacker exceeds": lambda r: figure(r["twin"]["detection"]["asr_ceiling"]),
        "Presidio + spaCy: found / touched": lambda r: recall_touched(r["presidio"]),
    }
    return by(columns, real_rows(reports))


def real_attacks(reports: Mapping[str, Row]) -> str:
    """Attack by attack on the real model."""
    columns = {
        "text (SmolLM2)": text("source"),
        **attacked_by("inversion", "probe", "tuned-receiver"),
    }
    rows = [
        {"source": one["source"], **row} for one in real_rows(reports) for row in one["results"]
    ]
    return by(columns, rows)


def attacked_by(*names: str) -> Columns:
    """A guard, attack by attack."""
    return {
        "guard": text("guard"),
        **UTILITY,
        "injection": cell("asr_injection"),
        **{n: lambda r, n=n: by_attack(r, n) for n in names},
        "floor": plain("floor"),
        "recovered / resisted": GUARDS["recovered / resisted"],
    }


def real_rows(reports: Mapping[str, Row]) -> list[Row]:
    presidio = reports["detect"]["held_out"]
    out = []
    for report in reports.values():
        if "results" in report:
            source = report["data"]["source"]
            rows = {r["guard"]: r for r in report["results"]}
            own = {"source": source, "results": report["results"]}
            out.append({**rows, **own, "presidio": presidio[source]["presidio"]})
    return out


def beside(row: Row, key: str) -> str:
    return ", ".join(figure(row[name][key]) for name in ("identity", "redact", "twin"))


def recall_touched(detected: Row) -> str:
    return f"{figure(detected['recall'])} / {figure(detected['task_touched'])}"


def by_attack(row: Row, name: str) -> str:
    one = row["asr_fresh_by_attack"].get(name)
    return "-" if one is None else figure(one["asr"]) + interval(one["ci"])


def readers(report: Row) -> str:
    """Right answers with the adapters and without."""
    columns: Columns = {
        "held-out questions": text("source"),
        "without": lambda r: of_asked(r["without"]),
        "with the reader": lambda r: of_asked(r["with"]),
    }
    return by(columns, [{"source": name, **r} for name, r in report["answers"].items()])


def of_asked(found: Row) -> str:
    return f"{figure(found['share'])} ({found['right']} of {found['asked']})"
