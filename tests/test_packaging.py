"""The wheel holds every module under its lcguard name only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

ROOMS = ("agents", "attacks", "server")
NAMESPACES = ("agents", "agents/nano", "agents/scenarios", "agents/backends", "attacks", "server")
PROBE = "packaging_probe"


def python(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(copy: Path) -> Path:
    """What the wheel is made from, so that building leaves nothing in the checkout."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("lcguard", *ROOMS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


def built(source: Path, out: Path) -> Path:
    """The wheel of such a copy."""
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each room gets one more module: the packaging is tested whatever the rooms hold."""
    copy = copied(tmp_path_factory.mktemp("source"))
    for folder in NAMESPACES:
        (copy / folder).mkdir(exist_ok=True)
        (copy / folder / f"{PROBE}.py").write_text("VALUE = 1\n")
    (copy / "agents/nano/weights-v1.0").mkdir()
    (copy / "agents/nano/weights-v1.0/model.safetensors").write_bytes(b"x")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(source, tmp_path_factory.mktemp("wheel"))


def test_rooms_are_links_without_init() -> None:
    for room in ROOMS:
        assert os.readlink(ROOT / "lcguard" / room) == f"../{room}"
        assert not (ROOT / room / "__init__.py").exists()


def test_wheel_holds_every_module(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"lcguard", "lcguard-0.1.0.dist-info"}
    expected = {
        path.relative_to(source).as_posix()
        for folder in [source / "lcguard", *(source / "lcguard" / room for room in ROOMS)]
        for path in folder.rglob("*.py")
    }
    assert {f"lcguard/{folder}/{PROBE}.py" for folder in NAMESPACES} <= expected
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_holds_the_data(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    nano = source / "lcguard/agents/nano"
    kinds = {".json", ".safetensors", ".jinja", ".txt", ".yaml", ".md"}
    expected = {
        path.relative_to(source).as_posix() for path in nano.rglob("*") if path.suffix in kinds
    }
    page = "lcguard/server/dashboard/templates/dashboard"
    expected |= {f"{page}.{kind}" for kind in ("html", "css", "js")}
    expected.add("lcguard/server/gateway/contract.yaml")
    assert expected | {"lcguard/py.typed"} <= names


def test_installed_beside_openai_agents(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for room in ROOMS:
        (site / room).mkdir(parents=True)
        (site / room / "__init__.py").write_text("OWNER = 'someone else'\n")
    python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"),
        *("--target", str(site), str(wheel)),
        cwd=elsewhere,
    )
    code = f"""
import agents, attacks, server, lcguard, lcguard.agents.nano.{PROBE}, lcguard.attacks.{PROBE}
import lcguard.attacks, lcguard.server.{PROBE}
for module in (agents, attacks, server):
    assert module.OWNER == "someone else"
for module in (lcguard, lcguard.attacks.{PROBE}, lcguard.server.{PROBE}):
    assert module.__file__.startswith({str(site)!r}), module.__file__
"""
    python("-c", code, cwd=elsewhere, PYTHONPATH=str(site))


def test_rooms_import_from_another_folder(tmp_path: Path) -> None:
    code = "import lcguard.agents, lcguard.attacks, lcguard.server"
    python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="would install the CUDA builds")
def test_make_gpu_touches_nothing_without_a_driver(tmp_path: Path) -> None:
    """The working CPU environment stays, and one line says which target is meant for it."""
    needed = ("Makefile", "pyproject.toml", "requirements-dev.txt", "requirements-models.txt")
    for name in needed:
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho called >> called\n")
    python.chmod(0o755)
    done = subprocess.run(["make", "gpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no nvidia-smi here" in done.stderr
    assert "on a CPU: make vllm" in done.stderr
    assert not (tmp_path / "called").exists()
