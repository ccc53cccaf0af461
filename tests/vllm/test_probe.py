"""``lcguard probe``: says what holds on this machine, and ends in 1 where something does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lcguard.agents.nano.load import model_path
from lcguard.vllm import probe as module
from lcguard.vllm.probe import probe
from tests.engine import HAS_VLLM, KEY
from tests.fixtures import tiny_model


def findings(model: str | None = None) -> dict[str, tuple[bool | None, str]]:
    return {f.what: (f.ok, f.detail) for f in probe(model)}


def test_the_shipped_agent_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCGUARD_KEY", KEY)
    found = findings(str(model_path()))
    ok, detail = found["model"]
    assert ok
    assert "4 layers, 2 KV heads of 32" in detail
    assert found["key"] == (True, "LCGUARD_KEY is set")
    assert found["vllm"][0] == HAS_VLLM


def test_what_does_not_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCGUARD_KEY", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    gemma = tiny_model("gemma2")
    gemma.save_pretrained(tmp_path)
    found = findings(str(tmp_path))
    assert found["key"][0] is False
    assert found["model"][0] is False
    assert "sliding windows of 128 tokens" in found["model"][1]
    if HAS_VLLM:
        assert found["plugin"][0] is False
        assert "VLLM_PLUGINS" in found["plugin"][1]
    monkeypatch.setattr(module, "TESTED_VERSIONS", ("9.9.9",))
    ok, detail = findings()["vllm"]
    assert ok is False
    assert "9.9.9" in detail or "not installed" in detail


def test_the_command_ends_in_one_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCGUARD_KEY", raising=False)
    command = [sys.executable, "-m", "lcguard.cli", "probe", "--model", "nano"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "LCGUARD_KEY is not set" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
