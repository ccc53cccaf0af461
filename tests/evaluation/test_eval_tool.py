"""``lcguard eval``: killed runs go on to the same figures, folders hold one run, gates close."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcguard.commands.inventory import count_units, find_runs
from lcguard.config import load_config
from lcguard.evaluation.outcomes import Journal
from lcguard.evaluation.plan import EvalConfig
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


def test_units_are_counted_before_they_are_made(home: Path) -> None:
    assert load_config(EvalConfig, home / "tiny.yaml").units == UNITS


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
