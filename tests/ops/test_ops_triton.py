"""The kernels are the reference: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.triton_cases import CASES, MOVED, TOLERANCE, Off, run
from tests.paths import ROOT

Found = dict[str, list[float]]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
pytestmark = needs_triton

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def child(module: str, cache: Path, *args: str, **env: str) -> Any:
    """What a test module prints when it is run. Triton reads the environment when imported."""
    settings = {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env}
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LCGUARD_OPS")}
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=clean | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, found: Found) -> None:
    off = Off(*found[name])
    tolerance = TOLERANCE[CASES[name].dtype]
    assert off.rewritten <= tolerance
    assert off.placed <= tolerance
    assert off.steps <= 1
    assert off.moved <= MOVED


def check_cipher(found: Found) -> None:
    """Words, draws and grid points: to the bit."""
    assert found["cipher"] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cache = tmp_path_factory.mktemp("triton")
    found: Found = child("tests.ops.triton_cases", cache, TRITON_INTERPRET="1")
    return found


@pytest.fixture(scope="module")
def on_device() -> Found:
    found: Found = {}
    run("cuda", found.__setitem__)
    return found


def test_draws_are_those_of_the_cipher_to_the_bit(interpreted: Found) -> None:
    check_cipher(interpreted)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_reference(name: str, interpreted: Found) -> None:
    check(name, interpreted)


@on_gpu
@pytest.mark.gpu
def test_draws_on_the_device(on_device: Found) -> None:
    check_cipher(on_device)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_the_device(name: str, on_device: Found) -> None:
    check(name, on_device)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_kernels_compile_for_hopper_once_for_all_keys(tmp_path: Path) -> None:
    found = child("tests.ops.triton_compile", tmp_path)
    assert sorted(found) == [
        "bottleneck_kernel",
        "expand_kernel",
        "place_kernel",
        "plain_kernel",
        "squeeze_kernel",
    ]
    assert {variants for variants, _ in found.values()} == {1}
