"""The evaluation over several hops: whole, resumable, and its attackers worth something."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcguard.commands.inventory import count_units, find_runs
from lcguard.config import ConfigError, load_config
from lcguard.evaluation.graph_segments import topology_of
from lcguard.evaluation.multihop_plan import MultihopConfig, TopologySpec
from lcguard.evaluation.presets import load_plan
from lcguard.evaluation.run import evaluate
from tests.paths import ROOT
from tests.test_cli import lcguard, one_line

CONFIG = ROOT / "scripts" / "configs" / "multihop.yaml"

SMALL = """
kind: multihop
data: {seed: 31, train_scenarios: 24, test_scenarios: 8, warm_records: 30}
topologies:
  - {name: chain-3, kind: chain, agents: 3}
  - name: fan
    links:
      - {source: a, audience: b}
      - {source: a, audience: c, forbid: [person, government_id, contact, account, health]}
guards:
  - {name: identity, guard: identity}
  - {name: gate, variant: full-system, path: "nano:gate-full"}
attacks:
  - {name: inversion, attack: inversion}
  - name: composition
    attack: composition
    warm: true
    options: {fit: {steps: 2, batch: 4}}
    clean_fit: {steps: 2, batch: 4}
  - {name: decoder, attack: decoder, options: {fit: {steps: 2, batch: 4}}}
seeds: [0]
run_all: [identity]
once: [composition]
curves: {hops: 2, agents: [2, 3], guards: [gate/full-system], attack: decoder,
         train_scenarios: 6, test_scenarios: 4}
latency: {runs: 1, context_tokens: 40}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MultihopConfig:
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(SMALL)
    return load_config(MultihopConfig, path)


@pytest.fixture(scope="module")
def whole(
    plan: MultihopConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    evaluate(plan, out, "test")
    return out, json.loads((out / "report.json").read_text())


def test_a_row_for_every_guard_and_graph(whole: tuple[Path, dict[str, Any]]) -> None:
    out, report = whole
    rows = {(r["topology"], r["guard"], r["variant"]): r for r in report["results"]}
    assert set(rows) == {
        (t, *g)
        for t in ("chain-3", "fan")
        for g in (("identity", "per-agent"), ("gate", "full-system"))
    }
    raw = rows["chain-3", "identity", "per-agent"]
    assert raw["utility"] == raw["utility_vanilla"] > 0.9
    assert raw["asr_graph"] == raw["asr_edge_max"] == 1.0
    assert raw["asr_graph_best"] == "inversion"
    assert set(raw["asr_graph_by_attack"]) == {"inversion", "composition", "decoder"}
    assert raw["composed"]["graph"] == 1.0
    assert raw["composed"]["secrets"] > 0
    assert raw["floor"] < 0.3
    assert raw["latency_vs_text"] > 0
    hidden = rows["chain-3", "gate", "full-system"]
    assert hidden["asr_graph"] < 0.3
    assert hidden["utility"] > 0.8 * hidden["utility_vanilla"]
    # no further attack where the first has won, but on the first topology
    assert set(rows["fan", "identity", "per-agent"]["asr_graph_by_attack"]) == {"inversion"}
    for kind in ("md", "html"):
        text = (out / f"report.{kind}").read_text()
        assert "chain-3" in text
        assert "By number of agents" in text


def test_curves_have_a_point_for_every_size(whole: tuple[Path, dict[str, Any]]) -> None:
    curves = whole[1]["curves"]
    assert [p["hops"] for p in curves["hops"]] == [1, 2]
    assert [p["agents"] for p in curves["agents"]] == [2, 3]
    assert curves["agents"][0]["composed_secrets"] == 0  # one holder composes nothing
    assert all(p["utility"] is not None for p in curves["hops"] + curves["agents"])


def test_a_policy_of_one_link_shows_there_alone(whole: tuple[Path, dict[str, Any]]) -> None:
    attempts = [json.loads(line) for line in (whole[0] / "attempts.jsonl").read_text().splitlines()]
    tried = [a for a in attempts if a["type"] == "attempt" and a["kind"] == "attack"]
    by_edge = {e: {a["category"] for a in tried if a["edge"] == e} for e in ("a->b", "a->c")}
    assert not by_edge["a->c"] & {"finance", "confidential"}
    assert by_edge["a->b"] & {"finance", "confidential"}


def test_an_interrupted_run_ends_in_the_same_report(
    plan: MultihopConfig, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def after(limit: int) -> Callable[[int], None]:
        def count(units: int) -> None:
            if units >= limit:
                raise Stop

        return count

    for limit in (2, 5, 9):
        with pytest.raises(Stop):
            evaluate(plan, tmp_path, "test", progress=after(limit))
    evaluate(plan, tmp_path, "test")
    again = json.loads((tmp_path / "report.json").read_text())
    # measured once a run, so another run has its own
    for row in again["results"] + whole[1]["results"]:
        row.pop("latency", None)
        row.pop("latency_vs_text", None)
    assert again["results"] == whole[1]["results"]
    assert again["curves"] == whole[1]["curves"]
    changed = replace(plan, seeds=(4,))
    with pytest.raises(ValueError, match="holds a run with another configuration: seeds"):
        evaluate(changed, tmp_path, "test")


def test_the_shipped_plan_names_what_the_benchmark_is_about() -> None:
    plan = load_plan(MultihopConfig, CONFIG, [], None)
    assert [t.name for t in plan.topologies] == ["chain-4", "hierarchy-4", "graph-6"]
    assert {g.label for g in plan.guards} >= {"gate/per-agent", "gate/full-system"}
    assert len(plan.seeds) == 3
    graph = topology_of(plan.topologies[2])
    assert len(graph.agents) == 6
    assert len(graph.paths()) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: chain, agents: 3", "kind: chain", "a graph has links and no number of agents"),
        ("attack: decoder,\n", "attack: probe,\n", "curves.attack: 'probe' is not one of"),
        ("once: [composition]", "once: [guess]", "once: 'guess' is not one of inversion"),
        ("run_all: [identity]", "run_all: [gait]", "run_all: 'gait' is not one of identity"),
        ("seeds: [0]", "seeds: []", "seeds is empty"),
        ("seeds: [0]", "sedes: [0]", "did you mean 'seeds'"),
        ("name: fan", "name: chain-3", "topologies: 'chain-3' stands twice"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SMALL
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_config(MultihopConfig, path)


def test_unknown_guards_and_cycles_end_before_anything_is_written(
    plan: MultihopConfig, tmp_path: Path
) -> None:
    loop = load_config(
        MultihopConfig,
        None,
        [
            "topologies=[{name: x, links: [{source: a, audience: b}, {source: b, audience: a}]}]",
            "guards=[{name: identity, guard: identity}]",
            "attacks=[{name: probe, attack: probe}]",
        ],
    )
    with pytest.raises(ValueError, match="topology 'x' has a cycle"):
        evaluate(loop, tmp_path / "a", "test")
    odd = replace(
        plan,
        attacks=(replace(plan.attacks[0], attack="guess"),),
        curves=type(plan.curves)(),
        once=(),
    )
    with pytest.raises(ValueError, match="attack 'guess' is unknown"):
        evaluate(odd, tmp_path / "b", "test")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert TopologySpec("c", "chain", 2).agents == 2


HOPS = """\
kind: multihop
title: hops
data: {seed: 5, train_scenarios: 12, test_scenarios: 4, min_fields: 2, max_fields: 2}
topologies: [{name: pair, kind: chain, agents: 3}]
guards: [{name: identity, guard: identity}, {name: redact, guard: redact}]
attacks: [{name: probe, attack: probe, options: {width: 32, fit: {steps: 10, batch: 64}}}]
seeds: [0]
"""


def test_several_hops_by_the_same_commands(tmp_path: Path) -> None:
    """``kind: multihop`` has its own schema and tables; folders, gates and lists are common."""
    (tmp_path / "hops.yaml").write_text(HOPS)
    gate = ("--fail-if", "identity.utility<0.1 or redact.asr>=0")
    done = lcguard("eval", "run", "hops.yaml", "--out", "runs/hops", *gate, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "violated: pair redact per-agent: asr" in done.stderr
    assert "ASR, graph" in done.stdout
    run = tmp_path / "runs" / "hops"
    assert "kind: multihop" in (run / "config.yaml").read_text()
    units = count_units(run / "attempts.jsonl")
    again = lcguard("eval", "resume", "runs/hops", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert count_units(run / "attempts.jsonl") == units
    before = (run / "report.md").read_text()
    (run / "report.md").unlink()
    shown = lcguard("eval", "report", "runs/hops", "--format", "md", cwd=tmp_path)
    assert shown.stdout == before + "\n"
    args = ("eval", "compare", "runs/hops", "runs/hops", "--fail-on-regression")
    same = lcguard(*args, cwd=tmp_path)
    assert same.returncode == 0, same.stderr
    assert "pair redact per-agent" in same.stdout
    (entry,) = find_runs(tmp_path / "runs")
    assert entry.state == f"complete, {units} units"
    assert entry.best is not None
    for option in ("--stress", "--quick"):
        refused = lcguard("eval", "run", "hops.yaml", "--out", "x", option, cwd=tmp_path)
        assert f"{option} is for evaluations of one hop" in one_line(refused)
