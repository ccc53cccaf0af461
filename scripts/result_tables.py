"""Writes the tables of README.md and docs/results.md from ``benchmarks/results``.

python scripts/result_tables.py            # print
python scripts/result_tables.py --write    # rewrite what stands between the markers
python scripts/result_tables.py --check    # exit 1 where other figures stand there
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import recipe_columns as recipe
import rounds_columns as rounds
import speed_columns as speed
import table_columns as columns

from lcguard.commands.script import run_script

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")

# File of results -> how it is made.
OUT = "--out benchmarks/results"
COMMANDS = {
    "demo": "lcguard demo --out runs/demo",
    "main": "lcguard eval run main --out runs/main",
    "certificate": f"lcguard eval certify nano:gate {OUT}/certificate.json",
    "draws": f"python scripts/measure_draws.py --secrets 4 {OUT}/draws.json",
    "gate_recipe": f"python scripts/bench_gate_recipe.py {OUT}/gate_recipe.json",
    "attacked_rounds": f"python scripts/bench_attacked_rounds.py {OUT}/attacked_rounds.json",
    "residual_search": "python scripts/search_residual.py",
    "handoff": f"python scripts/bench_handoff.py --repeats 11 {OUT}/handoff.json",
    "handoff-smollm2": "python scripts/bench_handoff.py --tokens 128 512 --model FOLDER "
    f"--guard twin --guard-path smollm2:twin --dtype bfloat16 {OUT}/handoff-smollm2.json",
    "publish-smollm2": "python scripts/bench_publish_records.py --model FOLDER --data PATH "
    f"--records 40 {OUT}/publish-smollm2.json",
    "publish": f"python scripts/bench_publish.py --tokens 4096 --repeats 15 --maps per_head "
    f"--synthetic 1024x36 4096x9 {OUT}/publish.json",
    "reach": f"python scripts/measure_reach.py --records 80 {OUT}/reach.json",
    "proxy": f"python scripts/bench_proxy.py --concurrency 32 {OUT}/proxy.json",
    "soak": f"python scripts/soak.py --concurrency 32 --minutes 10 {OUT}/soak.json",
    "proxies": "python scripts/soak_proxies.py --requests 5000 --database postgresql://... "
    f"--store redis://... {OUT}/proxies.json",
    "growth": f"python scripts/simulate_growth.py {OUT}/growth.json --plot docs/growth.svg",
    "multihop": "lcguard eval run scripts/configs/multihop.yaml --out runs/multihop",
    "nano": "python scripts/train_nano.py --check agents/nano/model",
    "detect": "lcguard detect train twin-more --set model=smollm2 --out runs/twin-more",
    "detect-text": "lcguard detect train text --set model=smollm2 --out runs/text",
    "detect-text-4-layers": "lcguard detect train text --set model=smollm2 --set first_layers=4 "
    "--set 'options.layers=[0,1,2,3]' --out runs/text-4",
    "own_category": f"python scripts/measure_own_category.py {OUT}/own_category.json",
    "reader": "python scripts/train_reader.py --measure agents/smollm2/reader --asked-records 40 "
    "--results FILE",
    **{
        f"smollm2-{name}": f"lcguard eval run {name} --set model=smollm2 --data PATH --out DIR"
        for name in ("agentleak", "privacylens", "magpie")
    },
    "smollm2-budget": "lcguard eval run budget --set model=smollm2 --data PATH --out DIR",
    "smollm2-single-pass": "lcguard eval run single-pass --set model=smollm2 --data PATH --out DIR",
    "smollm2-main": "lcguard eval run main --set model=smollm2 --out DIR",
}

# Marker -> what makes a table of several files, by name, and which.
REAL = ("smollm2-agentleak", "smollm2-main", "smollm2-magpie", "smollm2-privacylens", "detect")
JOINED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "real": columns.real,
    "real_attacks": columns.real_attacks,
}

# Marker -> the file of results, and what makes a table of it.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "headline": ("main", columns.headline),
    "demo": ("demo", columns.guards),
    "likelihood": ("demo", columns.likelihood),
    "main": ("main", columns.guards),
    "main_likelihood": ("main", columns.likelihood),
    "policies": ("demo", columns.policies),
    "derived": ("demo", columns.derived),
    "certificate": ("certificate", columns.certificate),
    "ceilings": ("certificate", columns.ceilings),
    "draws": ("draws", columns.draws),
    "gate_recipe": ("gate_recipe", recipe.gate_recipe),
    "attacked_rounds": ("attacked_rounds", rounds.attacked_rounds),
    "residual_search": ("residual_search", columns.search),
    "handoff": ("handoff", speed.handoff),
    "handoff_real": ("handoff-smollm2", speed.handoff),
    "publish_records": ("publish-smollm2", speed.publish_records),
    "publish": ("publish", speed.publish),
    "synthetic": ("publish", speed.synthetic),
    "reach": ("reach", speed.reach),
    "proxy": ("proxy", speed.proxy),
    "soak": ("soak", speed.soak),
    "proxies": ("proxies", speed.proxies),
    "growth": ("growth", speed.growth),
    "growth_checks": ("growth", speed.growth_checks),
    "multihop": ("multihop", columns.multihop),
    "attackers": ("multihop", columns.attackers),
    "hops": ("multihop", columns.hops),
    "agents": ("multihop", columns.agents),
    "nano": ("nano", columns.nano),
    "detect": ("detect", columns.detected),
    "single_pass": (
        "smollm2-single-pass",
        lambda r: columns.by(columns.attacked_by("probe", "tuned-receiver"), r["results"]),
    ),
    "budget": (
        "smollm2-budget",
        lambda r: columns.by(columns.attacked_by("steps-8", "steps-24", "steps-80"), r["results"]),
    ),
    "detect_text": ("detect-text", columns.detected),
    "detect_text_4": ("detect-text-4-layers", columns.detected),
    "own_category": ("own_category", columns.own_category),
    "reader": ("reader", columns.readers),
}


def sections() -> dict[str, str]:
    """Marker -> table and where it comes from; results that were not made are left out."""
    out: dict[str, str] = {}
    for marker, (name, make) in TABLES.items():
        if found := read([name]):
            out[marker] = f"{make(found[name])}\n\n{source(found)}"
    several = read(REAL)
    for marker, join in JOINED.items():
        if len(several) > 1 and "detect" in several:
            out[marker] = f"{join(several)}\n\n{source(several)}"
    return out


def read(names: Sequence[str]) -> dict[str, Any]:
    """Those of the files of results that there are."""
    paths = [RESULTS / f"{name}.json" for name in names]
    return {p.stem: json.loads(p.read_text()) for p in paths if p.exists()}


def source(names: Iterable[str]) -> str:
    made = [f"`benchmarks/results/{name}.json`, made by `{COMMANDS[name]}`" for name in names]
    return f"From {'; '.join(made)}."


def fill(page: str, tables: Mapping[str, str]) -> str:
    """A page with the tables between its ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises ``ValueError`` for a marker that no table belongs to.
    """

    def put(found: re.Match[str]) -> str:
        name = found[1]
        if name not in tables:
            raise ValueError(f"<!-- {name} -->: no results for it in {RESULTS.name}/")
        return f"<!-- {name} -->\n{tables[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", put, page, flags=re.S)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    tables = sections()
    if not (args.write or args.check):
        print("\n\n".join(f"{name}\n\n{body}" for name, body in tables.items()))
    filled = {page: fill(page.read_text(), tables) for page in PAGES}
    if args.write:
        for page, after in filled.items():
            page.write_text(after)
    return int(args.check and any(page.read_text() != after for page, after in filled.items()))


if __name__ == "__main__":
    run_script(main)
