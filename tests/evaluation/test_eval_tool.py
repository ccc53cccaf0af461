"""``lcguard eval``: killed runs go on to the same figures, folders hold one run, gates close."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lcguard.agents.models import NAMED
from lcguard.agents.scenarios.load import load_hops
from lcguard.attacks.probe import ProbeAttack
from lcguard.commands.detector import DetectorRun
from lcguard.commands.evaluation import load
from lcguard.commands.inventory import count_units, find_runs
from lcguard.commands.progress import progress
from lcguard.config import dump_config, load_config
from lcguard.evaluation.compare import compare
from lcguard.evaluation.folder import RunFolder
from lcguard.evaluation.fresh_attacks import check_fresh, check_headline
from lcguard.evaluation.load import hops_for
from lcguard.evaluation.outcomes import Attempt, Journal, Outcome
from lcguard.evaluation.plan import AttackSpec, DataConfig, EvalConfig, GuardSpec
from lcguard.evaluation.presets import load_plan, preset, shipped
from lcguard.evaluation.quick import quickened
from lcguard.evaluation.stress import stressed
from lcguard.training.dataset import attack_data
from tests.fixtures import World
from tests.test_cli import files_of_at_most, lcguard, one_line

TINY = """\
title: tiny
data: {source: generator, seed: 31, train_records: 40, test_records: 12}
guards:
  - {name: identity, guard: identity}
  - {name: gaussian, guard: gaussian, options: {noise: 1.0}}
attacks:
  - {name: probe, attack: probe, options: {width: 48, fit: {steps: 20, batch: 128}}}
  - {name: decoder, options: {width: 32, fit: {steps: 2, batch: 8}}}
broken_at: null
injection: false
explain: 1
"""
UNITS = 7
"""A floor, the unguarded receiver, and for each guard its utility and two attacks."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and a finished, uninterrupted run in ``runs/whole``."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.yaml").write_text(TINY)
    done = lcguard("eval", "run", "tiny.yaml", "--out", "runs/whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A finished run to damage."""
    return Path(shutil.copytree(home / "runs" / "whole", tmp_path / "runs" / "copy"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = read(path)
    edit(content)
    path.write_text(json.dumps(content))


def drop_last_unit(run: Path) -> str:
    """The journal as a run leaves it that was killed while it wrote its last unit; its name."""
    lines = (run / "attempts.jsonl").read_bytes().splitlines(keepends=True)
    (run / "attempts.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    (run / "report.json").unlink()
    unit = json.loads(lines[-1])["content"]
    return "({kind}, {guard}, {policy}, {attack}, {seed})".format(**unit)


def figures(run: Path) -> Any:
    """The report without what is measured by the clock or says when and where it ran."""
    report = read(run / "report.json")
    for row in report["results"]:
        assert set(row.pop("latency_ms")) == {"prefill", "guard"}
    for key in ("created", "command", "git", "hardware", "resumed", "notes"):
        report.pop(key, None)
    report["hashes"].pop("source")  # somebody may be editing a file
    return report


NEVER_ENDS = f"""
import sys, threading
from lcguard.cli import main
from lcguard.evaluation.outcomes import Journal

write, written = Journal.write, []

def waits_before_the_last(self, *args, **more):
    if len(written) == {UNITS - 1}:
        threading.Event().wait()
    write(self, *args, **more)
    written.append(1)

Journal.write = waits_before_the_last
sys.argv[0] = "lcguard"
main()
"""
"""A run that is killed before its last unit, however late that comes."""


def test_killed_and_resumed_ends_in_the_same_report(home: Path, tmp_path: Path) -> None:
    """``kill -9`` once something is on disk; then ``resume`` without the configuration."""
    out = tmp_path / "killed"
    command = [sys.executable, "-c", NEVER_ENDS, "eval", "run", "tiny.yaml", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as many threads as this process
    child = subprocess.Popen(
        command, cwd=home, env=env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        journal = out / "attempts.jsonl"
        while child.poll() is None and not (journal.exists() and count_units(journal)):
            time.sleep(0.02)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    kept = count_units(journal)
    assert 1 <= kept < UNITS
    assert not (out / "report.json").exists()
    assert (out / "config.yaml").exists()
    assert read(out / "manifest.json")["seeds"] == [0]
    done = lcguard("eval", "resume", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert count_units(journal) == UNITS
    assert figures(out) == figures(home / "runs" / "whole")
    (later,) = read(out / "manifest.json")["resumed"]
    assert "eval resume" in later["command"]


INTERRUPTED = """
import os, signal, sys
from lcguard.cli import main
from lcguard.evaluation.outcomes import Journal

write, written = Journal.write, []

def interrupted_before_the_third(self, *args, **more):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    write(self, *args, **more)
    written.append(1)

Journal.write = interrupted_before_the_third
sys.argv[0] = "lcguard"
sys.exit(main())
"""


def test_nothing_more_is_done_after_ctrl_c(home: Path, tmp_path: Path) -> None:
    """Not even the unit whose figures are there already is written."""
    out = tmp_path / "stopped"
    command = [sys.executable, "-c", INTERRUPTED, "eval", "run", "tiny.yaml", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert (
        done.stderr.splitlines()[-1] == f"lcguard: stopped; resume with: lcguard eval resume {out}"
    )
    assert count_units(out / "attempts.jsonl") == 2
    assert not (out / "report.json").exists()


def test_a_full_disk_ends_an_evaluation_in_one_line_and_it_goes_on(
    home: Path, tmp_path: Path
) -> None:
    whole = home / "runs" / "whole"
    words = ("eval", "run", str(home / "tiny.yaml"), "--out", "run")
    with files_of_at_most((whole / "attempts.jsonl").stat().st_size // 2):
        line = one_line_at_end(lcguard(*words, cwd=tmp_path))
    assert line.startswith("lcguard: [Errno 27] File too large")
    assert line.endswith("make room and run the same command again; what was done is kept")
    assert 1 <= count_units(tmp_path / "run" / "attempts.jsonl") < UNITS
    done = lcguard(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "run") == figures(whole)


def test_what_a_run_leaves_behind(home: Path) -> None:
    run = home / "runs" / "whole"
    assert load_config(EvalConfig, run / "config.yaml") == load_config(
        EvalConfig, home / "tiny.yaml"
    )
    manifest, report = read(run / "manifest.json"), read(run / "report.json")
    assert set(manifest) == {
        "created",
        "command",
        "seeds",
        "git",
        "python",
        "packages",
        "hardware",
        "hashes",
    }
    assert set(manifest["hashes"]) == {"config", "source", "data", "guards"}
    assert {k: report[k] for k in manifest} == manifest
    assert report["journal"]["units"] == UNITS
    assert report["errors"] == {"attempts": 0, "budget": 0, "exceeded": False}


def test_the_manifest_is_there_before_the_first_unit(home: Path, tmp_path: Path) -> None:
    """A run that dies at its first attack has said already what it was going to do."""
    text = TINY.replace("width: 48", "layers: [9], width: 48")
    (tmp_path / "bad.yaml").write_text(text)
    line = one_line_at_end(lcguard("eval", "run", "bad.yaml", "--out", "run", cwd=tmp_path))
    assert "layers=[9]" in line
    assert read(tmp_path / "run" / "manifest.json")["created"]
    assert (tmp_path / "run" / "config.yaml").exists()


def one_line_at_end(result: subprocess.CompletedProcess[str]) -> str:
    """The error after the lines that say how far the run got."""
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_folder_holds_one_run(home: Path) -> None:
    """Another configuration is refused by the key in which it differs, and changes nothing."""
    run = home / "runs" / "whole"
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for override, key in (
        ("seeds=[0,1]", "seeds"),
        ("data.test_records=13", "data.test_records is 12 there and 13 here"),
        ("broken_at=0.9", "broken_at is null there and 0.9 here"),
    ):
        args = ("eval", "run", "tiny.yaml", "--out", "runs/whole", "--set", override)
        line = one_line(lcguard(*args, cwd=home))
        assert key in line
        assert "eval resume" in line
    (home / "wider.yaml").write_text(TINY.replace("steps: 2,", "steps: 3,"))
    line = one_line(lcguard("eval", "run", "wider.yaml", "--out", "runs/whole", cwd=home))
    assert "attacks[1].options.fit.steps is 2 there and 3 here" in line
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_other_records_under_the_same_configuration_are_refused(copy: Path) -> None:
    """The data folder, or the code that makes the records, may have changed since."""
    change(copy / "manifest.json", lambda m: m["hashes"].update(data="0" * 64))
    line = one_line(lcguard("eval", "resume", str(copy), cwd=copy))
    assert "other records" in line


def test_a_journal_of_another_format_is_refused(copy: Path) -> None:
    """Its units would be taken for ones that are still to do."""
    journal = copy / "attempts.jsonl"
    lines = journal.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "content" in line)
    commit = json.loads(lines[first])
    commit["content"]["detail"].pop("format")
    journal.write_text("\n".join([*lines[:first], json.dumps(commit), *lines[first + 1 :]]) + "\n")
    before = journal.read_bytes()
    for command in ("resume", "report"):
        line = one_line(lcguard("eval", command, str(copy), cwd=copy))
        assert "another version of lcguard" in line
    assert journal.read_bytes() == before


def test_other_code_is_told(copy: Path) -> None:
    """Units of two versions may be in one report; it says so."""
    drop_last_unit(copy)
    change(copy / "manifest.json", lambda m: m["hashes"].update(source="0" * 64))
    done = lcguard("eval", "resume", str(copy), cwd=copy)
    assert done.returncode == 0, done.stderr
    report = read(copy / "report.json")
    assert "other code" in report["notes"][0]
    assert report["resumed"][0]["hashes"]["source"] != report["hashes"]["source"]


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("kind: multi\n" + TINY)
    assert "'multi'" in one_line(lcguard("eval", "run", "x.yaml", cwd=tmp_path))


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


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert "no config.yaml" in one_line(lcguard("eval", "resume", str(tmp_path), cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_report_from_the_journal_is_the_report(copy: Path) -> None:
    """Byte for byte, without the report there was, and in every form."""
    whole = (copy / "report.json").read_bytes()
    for name in ("report.json", "report.md", "report.html"):
        (copy / name).unlink()
    printed = lcguard("eval", "report", str(copy), "--format", "json", cwd=copy)
    assert printed.returncode == 0, printed.stderr
    assert (copy / "report.json").read_bytes() == whole
    assert json.loads(printed.stdout) == json.loads(whole)
    for form, start in (("md", "# tiny"), ("html", "<!doctype html>")):
        shown = lcguard("eval", "report", str(copy), "--stored", "--format", form, cwd=copy)
        assert shown.stdout.startswith(start)
        assert (copy / f"report.{form}").exists()
    table = lcguard("eval", "report", str(copy), "--stored", cwd=copy).stdout
    assert "gaussian" in table
    assert "pdf" in one_line(lcguard("eval", "report", str(copy), "--format", "pdf", cwd=copy))


def test_report_of_an_unfinished_run_is_refused(copy: Path) -> None:
    """And says what is missing; resuming makes just that."""
    dropped = drop_last_unit(copy)
    line = one_line(lcguard("eval", "report", str(copy), cwd=copy))
    assert f"1 units are missing, such as {dropped}" in line
    assert "eval resume" in line
    assert not (copy / "report.json").exists()
    stored = one_line(lcguard("eval", "report", str(copy), "--stored", cwd=copy))
    assert "no report.json" in stored
    (copy / "attempts.jsonl").write_bytes(b"")
    line = one_line(lcguard("eval", "report", str(copy), cwd=copy))
    assert f"{UNITS} units are missing, such as (floor, none, edge, decoder-blind, 0)" in line
    (copy / "manifest.json").unlink()
    assert "no manifest.json" in one_line(lcguard("eval", "report", str(copy), cwd=copy))


def test_gates_close(copy: Path) -> None:
    run = str(copy)
    gates = ("--fail-if", "identity.asr>=0", "--fail-if", "gaussian.injection>0.5")
    shut = lcguard("eval", "resume", run, *gates, cwd=copy)
    assert shut.returncode == 3
    first, second = [s for s in shut.stderr.splitlines() if s.startswith("violated: ")]
    assert first.startswith("violated: identity: asr 0")
    assert "not measured, which counts as violated" in second  # injection was switched off
    stored = ("eval", "report", run, "--stored", "--fail-if")
    assert lcguard(*stored, "asr>1", cwd=copy).returncode == 0
    assert lcguard(*stored, "asr_upper<2", cwd=copy).returncode == 3
    assert "speed" in one_line(lcguard(*stored, "speed>1", cwd=copy))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--fail-if", "gaus.asr>0.1"), "gaus"),
        (("--fail-if", "asr>"), "ends"),
        (("--set", "attacks=[{name: a, attack: train}]"), "trained against"),
        (("--set", "attacks=[{name: a, options: {weights: runs/a}}]"), "runs/a"),
        (("--set", "error_budget=-1"), "error_budget"),
        (("--set", "kind=multi"), "kind"),
    ],
)
def test_nothing_is_run_on_wrong_input(
    args: tuple[str, ...], says: str, home: Path, tmp_path: Path
) -> None:
    """Hours before the end it is known already that the gate has no such guard."""
    out = tmp_path / "out"
    line = one_line(lcguard("eval", "run", "tiny.yaml", "--out", str(out), *args, cwd=home))
    assert says in line
    assert not out.exists()


# -- the headline


def spec(**options: Any) -> EvalConfig:
    return EvalConfig(attacks=(AttackSpec("mine", options=options),))


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "attacker"},
        {"fit": {"checkpoint": "last"}},
        {"start": "runs/attacker.safetensors"},
    ],
)
def test_an_attacker_that_brings_weights_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="saved weights"):
        check_fresh(spec(**options))


def test_a_folder_of_weights_is_recognised(tmp_path: Path) -> None:
    check_fresh(spec(words=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="saved weights"):
        check_fresh(spec(words=str(tmp_path)))


def test_a_model_has_presets_of_its_own_and_else_the_embedded_ones() -> None:
    own = load_plan(EvalConfig, "agentleak", ["model=smollm2"], None)
    assert [g.path for g in own.guards if g.path] == ["smollm2:twin"]
    assert "nano:gate" in [g.path for g in load_plan(EvalConfig, "agentleak", [], None).guards]
    assert load_plan(EvalConfig, "demo", ["model=smollm2"], None).model == "smollm2"
    assert load_plan(EvalConfig, "demo", ["model=other"], None).guards == (
        load_plan(EvalConfig, "demo", [], None).guards
    )
    with pytest.raises(ValueError, match="with model=smollm2 also: agentleak, budget, demo"):
        preset("nothing", "smollm2")


def test_a_share_keeps_the_split_whatever_the_number_of_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hops = load_hops("generator", path=None, seed=1, split="test", n=60)

    monkeypatch.setattr("lcguard.evaluation.load.load_hops", lambda *args, **options: hops)
    data = DataConfig("agentleak", train_records=4500, test_records=1500)  # all there are

    def names(data: DataConfig) -> list[set[str]]:
        return [{h.scenario_id for h in side} for side in hops_for(data)]

    fitted, held = names(data)
    for n in (4, 7):
        few = replace(data, train_records=n, test_records=n, train_share=0.75)
        train, test = hops_for(few)
        assert (len(train), len(test)) == (n, n)
        assert names(few)[0] <= fitted
        assert names(few)[1] <= held
    loose = names(replace(data, train_records=7, test_records=14))[1]
    assert loose & fitted  # without it fewer records move the border


def test_no_preset_measures_what_the_shipped_detector_was_fitted_on() -> None:
    """The scenarios' order is the seed's, so a border that is not before the detector's will do."""
    detector = load_plan(DetectorRun, "twin", ["model=smollm2"], None, "detect-")
    fitted = {d.source: d for d in detector.sources if d.source != "generator"}
    for name, own in fitted.items():
        data = load_plan(EvalConfig, name, ["model=smollm2"], None).data
        assert data.seed == own.seed
        assert data.train_share is not None
        assert data.train_share >= own.train_records / (own.train_records + own.test_records)


def test_shipped_presets_are_fresh() -> None:
    for path in (p for model in NAMED for p in shipped(model)):
        if not path.stem.startswith(("train-", "detect-")):
            check_fresh(load_config(EvalConfig, path))


def test_the_headline_is_from_an_attack_of_this_run() -> None:
    def attempt(kind: Any) -> Attempt:
        return Attempt(
            scenario="s",
            edge="a>b",
            record="r",
            guard="gate",
            policy="edge",
            attack="mine",
            seed=0,
            category="health",
            field="f/0",
            kind=kind,
            outcome=Outcome.SUCCESS,
        )

    row = {"guard": "gate", "asr_fresh_best": "mine"}
    check_headline([row], [attempt("attack")], spec())
    for attempts in ([], [attempt("train")], [attempt("floor")]):
        with pytest.raises(ValueError, match="not fitted in this run"):
            check_headline([row], attempts, spec())
    with pytest.raises(ValueError, match="'theirs'"):
        check_headline([{**row, "asr_fresh_best": "theirs"}], [attempt("attack")], spec())


# -- compare and list


def test_compare(home: Path, copy: Path) -> None:
    whole = str(home / "runs" / "whole")
    same = lcguard("eval", "compare", whole, str(copy), "--fail-on-regression", cwd=home)
    assert same.returncode == 0, same.stderr
    assert "WORSE" not in same.stdout

    def worsen(report: Any) -> None:
        row = next(r for r in report["results"] if r["guard"] == "gaussian")
        row.update(utility=row["utility"] - 0.2, guard_digest="other")

    change(copy / "report.json", worsen)
    worse = lcguard("eval", "compare", whole, str(copy), "--fail-on-regression", cwd=home)
    assert worse.returncode == 3
    assert [s for s in worse.stderr.splitlines() if s.startswith("worse: gaussian: utility")]
    assert "changed" in worse.stdout
    allowed = ("--threshold", "0.3", "--fail-on-regression")
    assert lcguard("eval", "compare", whole, str(copy), *allowed, cwd=home).returncode == 0
    assert lcguard("eval", "compare", str(copy), whole, *allowed[2:], cwd=home).returncode == 0

    change(copy / "report.json", lambda r: r["hashes"].update(data="0" * 64))
    assert "--force" in one_line(lcguard("eval", "compare", whole, str(copy), cwd=home))
    forced = lcguard("eval", "compare", whole, str(copy), "--force", cwd=home)
    assert forced.returncode == 0
    assert "differs: records" in forced.stderr
    (copy / "report.json").write_text("{}")
    assert "no results" in one_line(lcguard("eval", "compare", whole, str(copy), cwd=home))


def test_compare_counts_what_is_gone_and_tells_noise() -> None:
    def report(**guards: tuple[float | None, float]) -> dict[str, Any]:
        rows = [
            {
                "guard": g,
                "utility": 0.9,
                "asr_fresh": v,
                "asr_fresh_ci": None if v is None else [v - e, v + e],
            }
            for g, (v, e) in guards.items()
        ]
        return {"results": rows}

    found = compare(
        report(a=(0.1, 0.1), b=(0.1, 0.01), c=(0.1, 0.1), d=(0.1, 0.1)),
        report(a=(0.2, 0.1), b=(0.2, 0.01), c=(None, 0.0), e=(0.9, 0.1)),
    )
    by_name = {g.guard: g for g in found.guards}
    assert (by_name["a"].worse, by_name["a"].moves["asr"].overlap) == (True, True)
    assert (by_name["b"].worse, by_name["b"].moves["asr"].overlap) == (True, False)
    assert by_name["b"].moves["asr"].difference == pytest.approx(0.1)
    assert by_name["c"].worse  # no longer measured
    assert by_name["d"].worse  # no longer there
    assert not by_name["e"].worse  # was not there
    assert len(found.regressions()) == 5  # d lost its utility too


def test_list_tells_finished_from_interrupted(home: Path, copy: Path) -> None:
    runs = copy.parent
    shutil.copytree(copy, runs / "deep" / "cut")
    drop_last_unit(runs / "deep" / "cut")
    (runs / "guard").mkdir()
    (runs / "guard" / "config.yaml").write_text("train: {}\n")  # a training run, not ours
    found = {e.path.name: e for e in find_runs(runs)}
    assert set(found) == {"copy", "cut"}
    assert found["copy"].state == f"complete, {UNITS} units"
    assert found["copy"].best is not None
    assert found["cut"].state == f"interrupted, {UNITS - 1} units"
    assert found["cut"].guards == ("identity", "gaussian")
    if Path("/proc/locks").exists():
        with Journal(runs / "deep" / "cut" / "attempts.jsonl"):
            states = {e.path.name: e.state for e in find_runs(runs)}
        assert states["cut"] == f"running, {UNITS - 1} units"
    shown = lcguard("eval", "list", "--runs", str(runs), cwd=home)
    assert "deep/cut" in shown.stdout
    missing = one_line(lcguard("eval", "list", "--runs", "nowhere", cwd=home))
    assert "nowhere" in missing


def test_list_shows_what_is_registered(tmp_path: Path) -> None:
    shown = lcguard("eval", "list", "--attacks", "--guards", "--presets", cwd=tmp_path).stdout
    for word in (
        "white-box",
        "arXiv 2508.09442",
        "redact",
        "lcguard train gate-finish",
        "lcguard eval run main",
    ):
        assert word in shown


# -- progress and stress


@pytest.mark.parametrize(
    ("terminal", "ci", "bar"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_bar_is_for_people(
    terminal: bool, ci: str, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=terminal), 8) as (say, advance):
        advance(3)
        say("a line")
    assert "a line" in out.getvalue()
    assert ("3/8" in out.getvalue()) is bar


def test_units_are_counted_before_they_are_made(home: Path) -> None:
    assert load_config(EvalConfig, home / "tiny.yaml").units == UNITS


def test_stress_makes_every_attack_stronger(tmp_path: Path) -> None:
    weak = EvalConfig(
        guards=(GuardSpec("a"), GuardSpec("b", attacks=("one",)), GuardSpec("c", attacks=("two",))),
        attacks=(
            AttackSpec("one", "probe", {"width": 7, "fit": {"steps": 20, "lr": 0.1}}),
            AttackSpec("two", options={"width": 32}, warm=True, clean_fit={"steps": 5}),
            AttackSpec("three", "injection"),
        ),
    )
    strong = stressed(weak)
    by_name = {a.name: a for a in strong.attacks}
    assert by_name["one"].options == {"width": 7, "fit": {"steps": 200, "lr": 0.1}}
    assert by_name["two"].options == {"width": 64, "fit": {"steps": 3000}}
    assert by_name["two"].clean_fit == {"steps": 50}
    assert by_name["three"].options == {}
    probes = [f"probe-layer{i}" for i in range(4)]  # of the nano agent
    assert list(by_name) == ["one", "two", "three", *probes]
    assert by_name["probe-layer2"].options == {**by_name["one"].options, "layers": [2]}
    assert [g.attacks for g in strong.guards] == [(), ("one", *probes), ("two",)]
    with pytest.raises(ValueError, match="probe-layer0"):
        stressed(strong)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(strong))
    assert load_config(EvalConfig, path) == strong
    RunFolder(tmp_path).check(strong)
    with pytest.raises(ValueError, match="title"):
        RunFolder(tmp_path).check(weak)


def test_quick_makes_less_of_everything() -> None:
    full = load(Path("demo"), (), None)
    assert isinstance(full, EvalConfig)
    quick = quickened(full)
    assert (quick.data.train_records, quick.data.test_records) == (225, 40)
    by_name = {a.name: a for a in quick.attacks}
    assert by_name["probe"].options == {"fit": {"steps": 33, "batch": 2048}}
    assert by_name["decoder-warm"].clean_fit["steps"] == 40
    assert by_name["likelihood"].options == {"lists": [10, 100], "max_records": 6}
    assert [g.name for g in quick.guards] == [g.name for g in full.guards]
    assert (quick.policies, quick.derived, quick.seeds) == ((), None, (0,))
    assert load(Path("demo"), (), None, quick=True) == quick
    # of several attacks of a kind the first, and no list that takes minutes
    main = load(Path("main"), (), None, quick=True)
    assert [a.name for a in main.attacks] == ["probe", "decoder-warm", "likelihood"]
    assert main.attacks[-1].options["lists"] == [10, 100]
    real = load(Path("main"), ("model=smollm2",), None, quick=True)
    assert isinstance(real, EvalConfig)
    assert (real.data.train_records, real.data.test_records) == (8, 6)


def test_a_quick_run_says_so_and_judges_nothing(home: Path, tmp_path: Path) -> None:
    command = ("eval", "run", str(home / "tiny.yaml"), "--out", "run", "--quick")
    done = lcguard(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny (quick run)" in done.stdout
    report = read(tmp_path / "run" / "report.json")
    assert report["data"]["train_records"] == 10
    assert all(row["quick"] for row in report["results"])
    assert report["notes"][0].startswith("This is a quick run")
    for name in ("report.md", "report.html"):
        assert "This is a quick run" in (tmp_path / "run" / name).read_text()
    assert "quick" not in read(home / "runs" / "whole" / "report.json")["results"][0]
    resumed = lcguard("eval", "resume", "run", cwd=tmp_path)
    assert "tiny (quick run)" in resumed.stdout
    gated = ("--fail-if", "gaussian.asr_upper>0.99")
    for words in ((*command, *gated), ("eval", "report", "run", "--stored", *gated)):
        assert "says nothing of a quick run" in one_line(lcguard(*words, cwd=tmp_path))
    both = lcguard(*command, "--stress", cwd=tmp_path)
    assert "leave one of them out" in one_line(both)


def test_a_probe_of_one_layer_reads_that_layer_alone(world: World) -> None:
    def pairs(records: Any) -> Any:
        data = attack_data(records, world.source.prefill([r.ids for r in records]), world.special)
        keys, values = data.kv.keys.clone(), data.kv.values.clone()
        keys[:, 1], values[:, 1] = 0.0, 0.0  # nothing left in the second layer
        return data.with_kv(replace(data.kv, keys=keys, values=values))

    train, test = pairs(world.records), pairs(world.others)
    score = {}
    for layer in (0, 1):
        attack = ProbeAttack.build(
            {"layers": [layer], "width": 96, "fit": {"steps": 150, "batch": 512, "warmup": 10}}
        )
        guesses = attack.fit(train).recover(test)
        score[layer] = torch.tensor([g.token_accuracy or 0.0 for g in guesses]).mean().item()
    assert score[0] > 0.5
    assert score[1] < 0.2
    with pytest.raises(ValueError, match="give 0 to 1"):
        ProbeAttack.build({"layers": [2]}).fit(train)
