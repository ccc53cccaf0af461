"""Prints the README's tables from ``benchmarks/results``; with ``--write`` puts them in place.

python scripts/readme_tables.py            # print
python scripts/readme_tables.py --write    # rewrite README.md between its markers
python scripts/readme_tables.py --check    # exit 1 where README.md shows other figures
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcguard.commands.script import run_script
from lcguard.evaluation.results import LIST
from lcguard.evaluation.verdict import verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f" [{pair[0]:.3f}, {pair[1]:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def guards(report: dict[str, Any]) -> str:
    """The main table of a report."""
    head = (
        "guard",
        "utility",
        "training-time ASR",
        "fresh ASR [95%]",
        "best attack",
        "injection",
        "floor",
        "ceiling",
        "recovered / resisted",
        "likelihood@10 (chance)",
        "likelihood@100 [95%] (chance)",
        "verdict",
    )
    return table(
        head,
        [
            (
                r["guard"],
                f"{figure(r['utility'])} of {figure(r['utility_vanilla'])}",
                figure(r["asr_train"]),
                figure(r["asr_fresh"]) + interval(r["asr_fresh_ci"]),
                str(r["asr_fresh_best"]),
                figure(r["asr_injection"]),
                figure(r["floor"]),
                figure(r["ceiling"]),
                f"{r['counts']['success']} / {r['counts']['resisted']}",
                listed(r, "10"),
                listed(r, "100"),
                verdict(r).word,
            )
            for r in report["results"]
        ],
    )


def listed(row: dict[str, Any], size: str) -> str:
    """What the optimal attacker recovers who chooses from a list; the interval of the headline."""
    found = row.get("likelihood", {}).get(size)
    if found is None:
        return "-"
    ci = interval(found["ci"]) if size == LIST else ""
    return f"{figure(found['asr'])}{ci} ({figure(found['floor'])})"


def likelihood(report: dict[str, Any]) -> str:
    """The optimal attacker, list by list."""
    head = ("guard", "candidates", "right [95%]", "chance", "blind", "median rank",
            "nats gained", "secrets")  # fmt: skip
    rows = [
        (r["guard"], f"{int(size):,}", figure(x["asr"]) + interval(x["ci"]), figure(x["floor"]),
         figure(x["blind"]), f"{x['rank_median']:g}", figure(x["nats"], 2), str(x["n"]))
        for r in report["results"]
        for size, x in r.get("likelihood", {}).items()
        if size.isdigit()
    ]  # fmt: skip
    return table(head, rows)


def draws(report: dict[str, Any]) -> str:
    """Several draws of one record, averaged."""
    sizes = report["lists"]
    head = ("draws of one record", *(f"right of {int(n):,} [95%]" for n in sizes))
    rows = [
        (str(n), *(figure(x["asr"]) + interval(x["ci"]) for x in by_size.values()))
        for n, by_size in report["draws"].items()
    ]
    chance = ("chance", *(figure(x["floor"]) for x in report["draws"]["1"].values()))
    return table(head, [*rows, chance])


def policies(report: dict[str, Any]) -> str:
    """One gate under several policies, and derived answers."""
    head = (
        "policy of the gate",
        "task",
        "allowed secrets",
        "fresh ASR on forbidden [95%]",
        "floor",
    )
    out = table(
        head,
        [
            (
                f"forbid {p['policy']}",
                f"{figure(p['utility'])} of {figure(p['utility_vanilla'])}",
                f"{figure(p['allowed_accuracy'])} of {figure(p['allowed_accuracy_vanilla'])}",
                figure(p["asr_forbidden"]) + interval(p["asr_forbidden_ci"]),
                figure(p["floor"]),
            )
            for p in report["policies"]
        ],
    )
    if report.get("derived"):
        head = (
            "derived value allowed, exact value forbidden",
            "derived answers right",
            "fresh ASR of the exact value [95%]",
            "best guess knowing the derived value",
        )
        out += "\n\n" + table(
            head,
            [
                (
                    d["source_category"],
                    f"{figure(d['accuracy'])} of {figure(d['accuracy_vanilla'])}",
                    figure(d["asr_exact"]) + interval(d.get("asr_exact_ci")),
                    figure(d["asr_exact_best_guess"]),
                )
                for d in report["derived"]
            ],
        )
    return out


def certificate(report: dict[str, Any]) -> str:
    """What the certified guards' segments can tell at most."""
    head = (
        "guard",
        "pair leak, mean",
        "95% upper bound",
        "median",
        "99%",
        "largest",
        "unguarded, same noise",
        "ASR ceiling",
        "pairs",
    )
    return table(
        head,
        [
            (
                r["guard"],
                f"{c['mean_nats']:.2f} nats",
                f"{c['upper_nats']:.2f}",
                f"{c['median_nats']:.2f}",
                f"{c['p99_nats']:.1f}",
                f"{c['max_nats']:.1f}",
                f"{c['raw_nats']:.0f}",
                "vacuous" if c["vacuous"] else f"{c['asr_ceiling']:.2f}",
                str(c["n_pairs"]),
            )
            for r in report["results"]
            if (c := r.get("certificate"))
        ],
    )


def nano(accuracy: dict[str, Any]) -> str:
    return table(
        ("questions", "exact match", "asked"),
        [
            (kind, figure(value), str(accuracy["questions"][kind]))
            for kind, value in accuracy["accuracy"].items()
        ],
    )


def search(report: dict[str, Any]) -> str:
    """Every setting of the published guard that was tried."""
    head = ("width", "beta", "steps", "lag", "objective", "utility", "training-time ASR",
            "fresh ASR")  # fmt: skip
    return table(
        head,
        [
            (
                str(r["bottleneck"]), str(r["beta"]), str(r["steps"]), str(r["lag"]),
                r["objective"], figure(r["utility"]), figure(r["asr_train"]),
                figure(max(r["asr_fresh"].values())),
            )
            for r in report["runs"]
        ],
    )  # fmt: skip


def handoff(report: dict[str, Any]) -> str:
    """Time to first token of the receiver, and what the sender spends."""
    head = ("context", "text", "vanilla KV", "guarded KV", "guarded / vanilla",
            "publish vanilla", "publish guarded")  # fmt: skip
    return table(
        head,
        [
            (
                f"{r['tokens']:,} tokens",
                *(f"{r['ttft_ms'][k]:.1f} ms" for k in ("text", "vanilla", "guarded")),
                f"{r['guarded_over_vanilla']:.2f}",
                *(f"{r['publish_ms'][k]:.1f} ms" for k in ("vanilla", "guarded")),
            )
            for r in report["rows"]
        ],
    )


def proxy(report: dict[str, Any]) -> str:
    """Latency and throughput by both ways, and of a bare relay."""
    loaded, alone = report["paired_at_concurrency"], report["paired_alone"]
    bare, rps = report["floor_at_concurrency"], report["throughput_rps"]
    streams = report["streams"]
    n = report["concurrency"]
    ms = "{:.1f} ms".format
    rows = [
        (f"added latency, p50, {n} at a time", ms(loaded["extra_p50_ms"]),
         ms(bare["extra_p50_ms"])),
        ("added latency, p50, one at a time", ms(alone["extra_p50_ms"]),
         ms(report["floor_alone"]["extra_p50_ms"])),
        ("throughput over direct", f"{report['throughput_share']:.3f} "
         f"({rps['proxy']:.1f} of {rps['direct']:.1f} requests/s)", "-"),
        ("gap between pieces of a stream, p50 (direct)", f"{ms(streams['proxy']['gap_p50_ms'])} "
         f"({ms(streams['direct']['gap_p50_ms'])})", "-"),
        ("pieces of a stream (direct)", f"{streams['proxy']['pieces']:.1f} "
         f"({streams['direct']['pieces']:.1f})", "-"),
    ]  # fmt: skip
    return table(("", "proxy", "floor"), rows)


def soak(report: dict[str, Any]) -> str:
    """Requests, memory, latency and the audit."""
    memory, audit = report["memory"], report["audit"]
    latency = report["latency"]
    rows = [
        ("requests", f"{report['requests']:,}, {report['n_5xx']} answered 5xx "
         f"({report['n_5xx_without_reason']} without a reason)"),
        ("memory of the proxy", f"{memory['first_quarter_mib']:.0f} MiB in the first quarter, "
         f"{memory['last_quarter_mib']:.0f} in the last; "
         f"{memory['slope_mib_per_min']:+.2f} MiB a minute over the second half"),
        ("open files", f"{memory['files_first']} at the start, {memory['files_last']} at the end"),
        ("audit", f"{audit['rows']:,} rows, whole; {audit['lost']} lost of "
         f"{sum(audit['told'].values()):,} that clients were told of"),
        ("latency, p50 / p99", ", ".join(
            f"{kind} {latency[kind]['p50_ms']:.0f} / {latency[kind]['p99_ms']:.0f} ms"
            for kind in ("chat", "publish", "consume"))),
    ]  # fmt: skip
    return table(("", "seen"), rows)


def multihop(report: dict[str, Any]) -> str:
    """Guards over several hops."""
    head = (
        "topology", "guard", "variant", "utility", "ASR, worst edge", "ASR, graph [95%]",
        "best attack", "floor", "gap", "composed ASR, edge -> graph", "latency / text",
    )  # fmt: skip
    return table(
        head,
        [
            (
                r["topology"], r["guard"], r["variant"],
                f"{figure(r['utility'])} of {figure(r['utility_vanilla'])}",
                figure(r["asr_edge_max"]), figure(r["asr_graph"]) + interval(r["asr_graph_ci"]),
                str(r["asr_graph_best"]), figure(r["floor"]), figure(r["gap"]),
                f"{figure(r['composed']['edge_max'])} -> {figure(r['composed']['graph'])}",
                figure(r["latency_vs_text"], 2),
            )
            for r in report["results"]
        ],
    )  # fmt: skip


def attackers(report: dict[str, Any]) -> str:
    """What every attack recovers of unguarded KV, and of the gate's, on the first topology."""
    rows = [r for r in report["results"] if r["topology"] == report["results"][0]["topology"]]
    shown = [r for r in rows if r["guard"] in ("identity", "gate")]
    names = sorted({n for r in shown for n in r["asr_graph_by_attack"]})
    head = ("attack", *(f"{r['guard']}, {r['variant']}" for r in shown))
    body = [(n, *(figure(r["asr_graph_by_attack"].get(n)) for r in shown)) for n in names]
    return table(head, body)


def curve(report: dict[str, Any]) -> str:
    """Leakage against hops and agents."""
    head = ("guard", "hop", "utility", "ASR at this hop", "ASR up to it")
    hops = table(
        head,
        [
            (p["guard"], str(p["hops"]),
             f"{figure(p['utility'])} of {figure(p['utility_vanilla'])}",
             figure(p["asr_edge"]), figure(p["asr_path"]))
            for p in report["curves"]["hops"] if p["hops"] in (1, 2, 4, 8)
        ],
    )  # fmt: skip
    head = ("guard", "agents", "utility", "ASR, graph", "composed ASR (secrets)")
    agents = table(
        head,
        [
            (p["guard"], str(p["agents"]),
             f"{figure(p['utility'])} of {figure(p['utility_vanilla'])}", figure(p["asr_graph"]),
             f"{figure(p['asr_composed'])} ({p['composed_secrets']})")
            for p in report["curves"]["agents"]
        ],
    )  # fmt: skip
    return f"{hops}\n\n{agents}"


def sections() -> dict[str, str]:
    """Marker name to table; results that were not made are left out."""
    out: dict[str, str] = {}
    benchmark = RESULTS / "main.json"
    if benchmark.exists():
        report = json.loads(benchmark.read_text())
        out |= {
            "main": guards(report),
            "policies": policies(report),
            "certificate": certificate(report),
        }
        if any(r.get("likelihood") for r in report["results"]):
            out["likelihood"] = likelihood(report)
    if (RESULTS / "agentleak.json").exists():
        out["agentleak"] = guards(json.loads((RESULTS / "agentleak.json").read_text()))
    for name, make in (
        ("residual_search", search), ("draws", draws), ("handoff", handoff), ("proxy", proxy),
        ("soak", soak),
    ):  # fmt: skip
        path = RESULTS / f"{name}.json"
        if path.exists():
            out[name] = make(json.loads(path.read_text()))
    if (RESULTS / "multihop.json").exists():
        report = json.loads((RESULTS / "multihop.json").read_text())
        out |= {
            "multihop": multihop(report), "attackers": attackers(report), "curves": curve(report),
        }  # fmt: skip
    check = RESULTS / "nano.json"
    if check.exists():
        out["nano"] = nano(json.loads(check.read_text()))
    return out


def fill(text: str, tables: dict[str, str]) -> str:
    """README text with the tables between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    for name, body in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"README.md has no markers <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)  # type: ignore[misc]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    readme, tables = ROOT / "README.md", sections()
    if args.write or args.check:
        before = readme.read_text()
        after = fill(before, tables)
        if args.check:
            return int(before != after)
        readme.write_text(after)
        return 0
    print("\n\n".join(f"{name}\n\n{body}" for name, body in tables.items()))
    return 0


if __name__ == "__main__":
    run_script(main)
