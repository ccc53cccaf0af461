"""How many engines, how much store and what latency so many handoffs an hour need, by simulation.

python scripts/simulate_growth.py --out benchmarks/results/growth.json --plot docs/growth.svg

Agents hand over independently, so what arrives is a Poisson stream. A handoff is a publish (proxy,
engine, store), then a consume (proxy, store, engine) that answers. An engine works in steps, as
vLLM does: each step generates a token for every request that runs and takes in those that wait. All
costs are measured ones, of ``benchmarks/results/{handoff,proxy,publish}.json``: the nano agent on
two CPU cores. What the model says of runs that it was not fitted to stands beside what was seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth_model import PROMPT_TOKENS, RESULTS, Costs, Kind, Plan, Site, closed, measured

from lcguard.commands.script import run_script, script_parser, write_report

RATES = (100, 1_000, 10_000, 100_000, 1_000_000)
SMALL = 0.7
"""Share of its time that a proxy is kept below."""


def checks(costs: Costs) -> list[dict[str, Any]]:
    """The model beside measured runs; it was fitted to the first alone."""
    seen, soak = (json.loads((RESULTS / f"{n}.json").read_text()) for n in ("proxy", "soak"))
    many, long, short = seen["concurrency"], seen["tokens"], 8
    prefill = costs.prefill_token * PROMPT_TOKENS

    def ran(clients: int, tokens: int, proxied: bool = False) -> tuple[float, float]:
        return closed(costs, clients, [Kind(prefill, tokens)], 40, proxied=proxied)

    paired, alone = seen["paired_at_concurrency"], seen["paired_alone"]
    rows = [
        (f"{many} clients, {long} tokens: requests/s", seen["throughput_rps"]["direct"]),
        (f"1 client, {short} tokens: p50, ms", alone["direct_p50_ms"]),
        (f"{many} clients, {short} tokens: p50, ms", paired["direct_p50_ms"]),
        ("the same through the proxy: p50, ms", paired["p50_ms"]),
        ("soak, 32 clients: requests/s", soak["requests"] / soak["samples"][-1]["at_s"]),
    ]
    simulated = (
        ran(many, long)[0],
        ran(1, short)[1],
        ran(many, short)[1],
        ran(many, short, True)[1],
        closed(costs, 32, soak_kinds(costs, soak["latency"]), 200, proxied=True)[0],
    )
    return [
        {
            "run": name,
            "measured": round(there, 2),
            "simulated": round(here, 2),
            "off": round(here / there - 1, 4),
            "fitted": i == 0,
        }
        for i, ((name, there), here) in enumerate(zip(rows, simulated, strict=True))
    ]


def soak_kinds(costs: Costs, latency: Mapping[str, Any]) -> list[Kind]:
    """The requests of ``soak``, as often as they were answered. Half of the clients that hang up
    publish; half do at their first token, the others within a second, of an answer of 512."""
    short = measured(256)  # the shortest context whose publish was measured
    prefill = costs.prefill_token * PROMPT_TOKENS
    gone = (prefill + short.publish) / 2
    asked = {
        "chat": (prefill, 16),
        "stream": (prefill, 32),
        "publish": (short.publish, 2),
        "consume": (short.consume, 16),
        "refused": (0.0, 0),
        "malformed": (0.0, 0),
    }
    hang_up = latency["hangs_up"]["n"] / 2
    return [
        *(Kind(*asked[name], weight=latency[name]["n"]) for name in asked),
        Kind(gone, 1, weight=hang_up),
        Kind(gone, 512, weight=hang_up, leaves_ms=(10.0, 1000.0)),
    ]


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def needed(rate: float, costs: Costs, plan: Plan, limit_ms: float) -> dict[str, Any]:
    """The fewest engines that keep 95 of 100 handoffs, publish and answer together, within
    ``limit_ms``."""
    per_ms = rate / 3_600_000
    proxies = max(1, math.ceil(2 * per_ms * costs.proxy / SMALL))
    handoffs = max(plan.handoffs, math.ceil(rate / 60))  # a minute, or a queue would not show
    own = costs.publish + costs.consume + costs.token * (plan.answer_tokens + 1)
    engines = max(1, math.floor(per_ms * own))  # fewer cannot keep up
    while True:
        tried = replace(plan, per_hour=rate, handoffs=handoffs, engines=engines, proxies=proxies)
        site = Site(tried, costs).run()
        if quantile(site.whole_ms, 0.95) <= limit_ms:
            break
        engines += max(1, engines // 20)
    return {
        "handoffs_per_hour": rate,
        "engines": engines,
        "proxies": proxies,
        # by Little's law: what comes in lives for its ttl
        "store_bytes": round(per_ms * plan.ttl_ms * costs.segment_bytes),
        "publish_ms": {f"p{q}": round(quantile(site.publish_ms, q / 100), 1) for q in (50, 95)},
        "consume_ms": {f"p{q}": round(quantile(site.consume_ms, q / 100), 1) for q in (50, 95)},
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Engines and latency over the rate."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        rates = [r["handoffs_per_hour"] for r in rows]
        left.plot(rates, [r["engines"] for r in rows], marker="o", color="#3f5f9e")
        left.set_yscale("log")
        left.set_title("engines", loc="left")
        for kind, colour in (("publish", "#c0341d"), ("consume", "#0a7561")):
            values = [r[f"{kind}_ms"]["p95"] for r in rows]
            right.plot(rates, values, marker="o", color=colour, label=kind)
        right.set_ylim(0)
        right.legend(frameon=False)
        right.set_title("p95, ms", loc="left")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("handoffs an hour")
            axes.spines[["top", "right"]].set_visible(False)
        blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata=blank)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(
        __doc__,
        context=(1024, "tokens of a context; one of those measured"),
        answer_tokens=64,
        limit_ms=(2000.0, "of publish and answer together, for 95 of 100 handoffs"),
        ttl_s=300.0,
        handoffs=(4000, "simulated at each rate, at least"),
        seed=0,
        plot=("", "SVG of engines and latency"),
    )
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES), help="an hour")
    args = parser.parse_args(argv)
    if min(args.rates) < 1 or args.handoffs < 20 or args.answer_tokens < 1 or args.ttl_s <= 0:
        raise ValueError("--rates, --answer-tokens and --ttl-s: above 0; --handoffs: 20 or more")
    costs = measured(args.context)
    alone = costs.publish + costs.consume + 2 * (costs.front + costs.proxy)
    alone += (costs.step + costs.token) * (args.answer_tokens + 1)
    if args.limit_ms <= alone:
        raise ValueError(f"--limit-ms {args.limit_ms}: a handoff alone takes {alone:.0f} ms")
    plan = Plan(
        per_hour=1.0,
        engines=1,
        handoffs=args.handoffs,
        answer_tokens=args.answer_tokens,
        ttl_ms=args.ttl_s * 1e3,
        seed=args.seed,
    )
    rows = []
    for rate in args.rates:
        rows.append(needed(rate, costs, plan, args.limit_ms))
        print(rows[-1], flush=True)
    if args.plot:
        plot(rows, Path(args.plot))
    found = {
        "costs": {k: round(v, 4) for k, v in vars(costs).items()},
        "checks": checks(costs),
        "rows": rows,
        **{name: getattr(args, name) for name in ("answer_tokens", "limit_ms", "ttl_s")},
    }
    for check in found["checks"]:
        print(check)
    write_report(args, "Growth", "python scripts/simulate_growth.py", found)
    return 0


if __name__ == "__main__":
    run_script(main)
