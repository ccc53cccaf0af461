"""The notebooks run, and print what they were committed with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.slow
def test_notebooks_print_what_they_printed() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/run_notebooks.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
