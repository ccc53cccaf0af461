"""The documentation builds without a warning, and what it builds asks no network for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_of_the_reference_holds_its_package(site: Path) -> None:
    for page, name in {
        "index": "lcguard.commands.api.load_guard",
        "core": "lcguard.segment.KVSegment",
        "guards": "lcguard.guards.frozen.FrozenGuard",
        "attacks": "lcguard.attacks.base.BaseAttack",
        "agents": "lcguard.agents.backends.hf.HFBackend.read",
        "handoff": "lcguard.handoff.policy.Policy",
        "vllm": "lcguard.vllm.llm.GuardedLLM",
        "server": "lcguard.server.app.make_app",
    }.items():
        assert f'id="{name}"' in (site / "reference" / f"{page}.html").read_text(), name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        found = [f for f in fetched.findall(page.read_text()) if 'rel="canonical"' not in f]
        assert not found, (page.name, found)
