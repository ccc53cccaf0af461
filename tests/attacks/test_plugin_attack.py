"""Attacks of third parties: installed like any package, found, run, and kept in their place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_eval_tool import TINY

PLUGIN = Path(__file__).parent / "plugin_attack"


def lcguard(*args: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a plugin stays in the registry of the one that loads it."""
    env = os.environ | {"PYTHONPATH": str(path), "COLUMNS": "240", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lcguard.cli", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plugin was installed by pip, from a copy: building writes beside the source."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    target = tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def add_plugin(site: Path, name: str, code: str) -> None:
    """A package as pip leaves it: a module and its metadata."""
    (site / f"{name}.py").write_text(code)
    info = site / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[lcguard.attacks]\n{name} = {name}\n")


def test_it_runs_like_a_built_in_attack(installed: Path, tmp_path: Path) -> None:
    """Its errors count against the budget: exit code 4, and a line in the report."""
    config = tmp_path / "prior.yaml"
    attack = "attacks: [{name: mine, attack: prior, options: {give_up: 3}}]\n"
    config.write_text(TINY.split("attacks:")[0] + attack + "injection: false\nexplain: 0\n")
    out = tmp_path / "run"
    args = ("eval", "run", str(config), "--out", str(out))
    done = lcguard(*args, path=installed, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    report = json.loads((out / "report.json").read_text())
    for row in report["results"]:
        assert row["asr_fresh_best"] == "mine"
        assert row["counts"]["error"] == 3
        assert sum(row["counts"].values()) == report["data"]["secrets"]
        assert row["asr_fresh"] < 0.5
    # both guards and the blind floor
    assert report["errors"] == {"attempts": 9, "budget": 0, "exceeded": True}
    assert "errors: 9 attempts ended in an error, the budget is 0" in done.stderr
    assert "9 attempts ended in an error" in (out / "report.md").read_text()


def test_broken_plugins_name_themselves_and_stop_nobody(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    registered = (PLUGIN / "prior_attack.py").read_text()
    thief = registered.replace('register("prior")', 'register("probe")')
    add_plugin(site, "thief", thief)
    add_plugin(site, "crash", registered.replace('"prior"', '"half"') + "\nraise OSError('no')\n")
    add_plugin(site, "idle", "VALUE = 1\n")
    done = lcguard("eval", "list", "--attacks", path=site, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = {line.split()[2]: line for line in done.stderr.strip().splitlines()}
    assert set(lines) == {"thief", "crash", "idle"}
    assert "OSError: no" in lines["crash"]
    assert "'probe' is taken" in lines["thief"]
    assert "registers no attack" in lines["idle"]
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    assert "black-box" in rows["prior"]
    assert "counting" in rows["prior"]
    assert "prior_attack" in rows["prior"]
    assert "built in" in rows["probe"]  # not the thief's
    assert "half" not in rows  # registered before its module failed


def test_a_plugin_imported_first_cannot_take_a_built_in_name(tmp_path: Path) -> None:
    code = (PLUGIN / "prior_attack.py").read_text()
    add_plugin(tmp_path, "thief", code.replace('register("prior")', 'register("decoder")'))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import thief"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "'decoder' is taken by DecoderAttack" in done.stderr
