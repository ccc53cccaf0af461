"""Tables of what a handoff, a publish and the proxy cost: a result in, a Markdown table out."""

from __future__ import annotations

from table_columns import Columns, Row, by, cell, table, text


def ms(value: float) -> str:
    return f"{value:.1f} ms"


def handoff(report: Row) -> str:
    """Time to first token of the receiver, and what the sender spends."""
    columns: Columns = {
        "context": lambda r: f"{r['tokens']:,} tokens",
        "text": lambda r: ms(r["ttft_ms"]["text"]),
        "vanilla KV": lambda r: ms(r["ttft_ms"]["vanilla"]),
        "guarded KV": lambda r: ms(r["ttft_ms"]["guarded"]),
        "guarded / vanilla": cell("guarded_over_vanilla", 2),
        "publish vanilla": lambda r: ms(r["publish_ms"]["vanilla"]),
        "publish guarded": lambda r: ms(r["publish_ms"]["guarded"]),
    }
    return by(columns, report["rows"])


def publish_records(report: Row) -> str:
    """What a publish costs on real records whose guard looks for the secrets."""
    columns: Columns = {
        "records": lambda r: f"{r['source']}, {r['rule']}",
        "tokens, mean": cell("tokens", 0),
        "plain prefill": lambda r: ms(r["publish_ms"]["plain"]),
        "publish unguarded": lambda r: ms(r["publish_ms"]["vanilla"]),
        "publish guarded": lambda r: ms(r["publish_ms"]["guarded"]),
        "guarded / plain": cell("guarded_over_plain", 2),
        "guarded / unguarded": cell("guarded_over_vanilla", 2),
    }
    return by(columns, report["rows"])


def publish(report: Row) -> str:
    """What the guard adds to a publish, in time and in memory."""
    columns: Columns = {
        "context": lambda r: f"{r['tokens']:,} tokens",
        **{k: lambda r, k=k: ms(r["publish_ms"][k]) for k in ("vanilla", "guarded")},
        "guarded / vanilla": cell("guarded_over_vanilla", 2),
        "processor time of the save alone": lambda r: (
            f"{ms(r['save_processor_ms']['vanilla'])}, {ms(r['save_processor_ms']['guarded'])}"
        ),
        "copy of its bytes (floor)": lambda r: ms(r["copy_ms"]),
        "segment": lambda r: mib(r["segment_bytes"]),
        "beside it: vanilla, guarded": lambda r: (
            f"{mib(r['peak_extra_bytes']['vanilla'])}, {mib(r['peak_extra_bytes']['guarded'])}"
        ),
    }
    return by(columns, report["rows"])


def synthetic(report: Row) -> str:
    """Memory of segments as large models have them."""
    columns: Columns = {
        "tokens": lambda r: f"{r['tokens']:,}",
        "layers of 8 KV heads of 128": text("layers"),
        "segment": lambda r: mib(r["segment_bytes"]),
        "beside it": lambda r: mib(r["peak_extra_bytes"]),
        "share": cell("share"),
        "gate's weights": lambda r: mib(r["guard_bytes"]),
        "processor time a 1,000 tokens and layer": lambda r: (
            f"{r['processor_s'] / r['tokens'] / r['layers'] * 1e6:.0f} ms"
        ),
    }
    return by(columns, report["synthetic"])


def mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.1f} MiB"


def reach(report: Row) -> str:
    """A guard that sees some tokens beside one that sees all."""
    columns: Columns = {
        "records in a segment": text("records_in_segment"),
        "longest": lambda r: f"{r['longest_tokens']:,} tokens",
        "sees": lambda r: f"{r['reach_tokens']} to either side" if r["reach_tokens"] else "all",
        "task answers right": cell("task_right"),
        "of values withheld": cell("value_tokens_withheld"),
        "of other tokens": cell("other_tokens_withheld"),
        "value tokens left open": lambda r: f"{r['value_tokens_open']} of {r['value_tokens']:,}",
        "largest change of a token's share": cell("most_moved"),
    }
    return by(columns, report["rows"])


def proxy(report: Row) -> str:
    """Latency and throughput by both ways, and of a bare relay."""
    ours, direct = report["streams"]["proxy"], report["streams"]["direct"]
    rps = "{proxy:.1f} of {direct:.1f} requests/s".format(**report["throughput_rps"])
    gaps = f"{ms(ours['gap_p50_ms'])} ({ms(direct['gap_p50_ms'])})"
    ways = ("paired_", "floor_")
    times = {"at_concurrency": f"{report['concurrency']} at a time", "alone": "one at a time"}
    rows = [
        (f"added latency, p50, {when}", *(ms(report[way + key]["extra_p50_ms"]) for way in ways))
        for key, when in times.items()
    ]
    rows += [
        ("throughput over direct", f"{report['throughput_share']:.3f} ({rps})", "-"),
        ("gap between pieces of a stream, p50 (direct)", gaps, "-"),
        ("pieces of a stream (direct)", f"{ours['pieces']:.1f} ({direct['pieces']:.1f})", "-"),
    ]
    return table(("", "proxy", "floor"), rows)


def growth(report: Row) -> str:
    """What so many handoffs an hour need."""
    columns: Columns = {
        "handoffs an hour": lambda r: f"{r['handoffs_per_hour']:,}",
        "engines": lambda r: f"{r['engines']:,}",
        "proxies": text("proxies"),
        "store": lambda r: f"{r['store_bytes'] / 1e9:,.2f} GB",
        "publish, p50 / p95": lambda r: both(r["publish_ms"]),
        "consume and answer, p50 / p95": lambda r: both(r["consume_ms"]),
    }
    return by(columns, report["rows"])


def growth_checks(report: Row) -> str:
    """The simulation beside measured runs."""
    columns: Columns = {
        "run": text("run"),
        "measured": lambda r: f"{r['measured']:,.1f}",
        "simulated": lambda r: f"{r['simulated']:,.1f}",
        "off by": lambda r: f"{r['off']:+.0%}" + (" (fitted)" if r["fitted"] else ""),
    }
    return by(columns, report["checks"])


def both(found: Row) -> str:
    return f"{found['p50']:.0f} / {found['p95']:.0f} ms"


def soak(report: Row) -> str:
    """Requests, memory, latency and the audit."""
    memory, audit, latency = report["memory"], report["audit"], report["latency"]
    failed = f"{report['n_5xx']} answered 5xx ({report['n_5xx_without_reason']} without a reason)"
    grown = f"{memory['slope_mib_per_min']:+.2f} MiB a minute over the second half"
    first, last = memory["first_quarter_mib"], memory["last_quarter_mib"]
    quarters = f"{first:.0f} MiB in the first quarter, {last:.0f} in the last"
    lost = f"{audit['lost']} lost of {sum(audit['told'].values()):,} that clients were told of"
    times = (
        f"{kind} {latency[kind]['p50_ms']:.0f} / {latency[kind]['p99_ms']:.0f} ms"
        for kind in ("chat", "publish", "consume")
    )
    rows = (
        ("requests", f"{report['requests']:,}, {failed}"),
        ("memory of the proxy", f"{quarters}; {grown}"),
        ("open files", f"{memory['files_first']} at the start, {memory['files_last']} at the end"),
        ("audit", f"{audit['rows']:,} rows, whole; {lost}"),
        ("latency, p50 / p99", ", ".join(times)),
    )
    return table(("", "seen"), rows)


def proxies(report: Row) -> str:
    """Several proxies, of which one is killed."""
    audit, ledger, beside = report["audit"], report["ledger"], report["evaluation"]
    told = f"{audit['lost']} lost of {sum(audit['told'].values()):,} that clients were told of"
    worker = beside["worker_killed_after"]
    journal = "the same" if beside["same_journal"] else "another"
    strangers = report["strangers_served"] + ledger["crossed_tenants"]
    rows = (
        ("requests", f"{report['requests']:,} in {report['seconds']:.0f} s"),
        (
            "killed",
            f"a proxy after {report['proxy_killed_after']:,} requests, with "
            f"{report['lost_with_the_killed']} answers on their way; a Ray worker after {worker:,}",
        ),
        ("answers that did not come from the others", f"{report['n_broken']}"),
        ("audit", f"{audit['rows']:,} rows, {len(audit['problems'])} problems; {told}"),
        ("budgets exceeded", f"{ledger['budgets_exceeded']} of {ledger['received']} receipts"),
        ("requests of another tenant that were served", f"{strangers}"),
        ("journal of the evaluation beside", f"{journal} as without Ray, to the byte"),
    )
    return table(("", "seen"), rows)
