"""Attempts, hashes and the journal, ``kill -9`` included."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcguard.evaluation.hashing import digest
from lcguard.evaluation.outcomes import Attempt, Journal, Outcome, read_attempts
from tests.paths import ROOT


def attempt(**change: Any) -> Attempt:
    base: dict[str, Any] = {
        "scenario": "s",
        "edge": "a->b",
        "record": "r0",
        "guard": "gate",
        "policy": "p",
        "attack": "probe",
        "seed": 0,
        "category": "salary",
        "field": "amount",
        "kind": "attack",
        "outcome": Outcome.RESISTED,
        "score": 0.25,
        "nll_nats": 3.5,
        "extra": {"k": (1, 2)},
    }
    return Attempt(**(base | change))


def unit(i: int) -> dict[str, Any]:
    return {"guard": "gate", "policy": "p", "attack": "probe", "seed": i, "config_hash": "c"}


def batch(i: int, n: int = 3) -> list[Attempt]:
    return [attempt(seed=i, record=f"r{j}") for j in range(n)]


def test_digest_ignores_order_and_knows_content() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": np.float64(0.5)}) == digest({"a": 0.5})
    assert len(digest(attempt())) == 64


@pytest.mark.parametrize("bad", [float("nan"), {"x": float("inf")}, {"x": object()}, {1, 2}])
def test_digest_refuses_what_is_not_json(bad: Any) -> None:
    with pytest.raises(ValueError, match="canonical JSON"):
        digest(bad)


def test_key_identifies_the_question_not_its_answer() -> None:
    assert attempt().key == attempt(outcome="success", score=1.0, extra={}).key
    for name, value in (("record", "r1"), ("seed", 1), ("kind", "floor"), ("field", "f")):
        assert attempt().key != attempt(**{name: value}).key


def test_attempt_survives_json_and_is_frozen() -> None:
    one = attempt()
    assert Attempt.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert hash(one) == hash(attempt())
    with pytest.raises(FrozenInstanceError):
        one.score = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": "maybe"}, "outcome 'maybe'"),
        ({"kind": "guess"}, "kind 'guess'"),
        ({"score": float("nan")}, "score is nan"),
        ({"nll_nats": float("inf")}, "use None"),
    ],
)
def test_attempt_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt(**change)


def test_from_dict_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="not an attempt"):
        Attempt.from_dict({"scenario": "s"})


def test_journal_resumes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    with Journal(path) as journal:
        assert journal.done(unit(0)) is None
        journal.write(unit(0), batch(0))
        journal.write(unit(1), [])
    with Journal(path) as journal:
        assert journal.done(unit(0)) == batch(0)
        assert journal.done(dict(reversed(unit(1).items()))) == []
        assert journal.units() == [unit(0), unit(1)]
        assert len(journal) == 2
        with pytest.raises(ValueError, match="committed already"):
            journal.write(unit(0), batch(0))
        journal.write(unit(2), batch(2))
        assert journal.attempts() == batch(0) + batch(2)
    assert read_attempts(path) == batch(0) + batch(2)


def test_journal_refuses_two_attempts_with_one_key(tmp_path: Path) -> None:
    with Journal(tmp_path / "run.jsonl") as journal:
        with pytest.raises(ValueError, match="share the key"):
            journal.write(unit(0), [attempt(), attempt(outcome="success")])
        assert journal.done(unit(0)) is None


def test_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.write(unit(0), batch(0))
        with pytest.raises(ValueError, match="another run"):
            Journal(path)
        assert read_attempts(path) == batch(0)
    Journal(path).close()


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(share=st.floats(0, 1))
def test_journal_cut_anywhere_keeps_whole_units(tmp_path: Path, share: float) -> None:
    path = tmp_path / f"{uuid4()}.jsonl"
    sizes = [0]
    with Journal(path) as journal:
        for i in range(3):
            journal.write(unit(i), batch(i))
            sizes.append(path.stat().st_size)
    cut = round(share * sizes[-1])
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = sum(size <= cut for size in sizes[1:])
    assert read_attempts(path) == [a for i in range(kept) for a in batch(i)]
    with Journal(path) as journal:
        assert path.stat().st_size == sizes[kept]
        for i in range(3):
            if journal.done(unit(i)) is None:
                journal.write(unit(i), batch(i))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("harm", ["outcome", "torn", "lost", "twice"])
def test_journal_refuses_damage_before_a_commit(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.write(unit(0), batch(0))
        journal.write(unit(1), batch(1))
    lines = path.read_text().splitlines(keepends=True)
    if harm == "outcome":
        lines[1] = lines[1].replace("resisted", "success")
    elif harm == "torn":
        lines[1] = lines[1][:20] + "\n"
    elif harm == "lost":
        del lines[1]
    else:
        lines += lines[:4]
    path.write_text("".join(lines))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="damaged"):
        Journal(path)
    assert path.read_bytes() == before


def test_failed_write_leaves_no_half_unit(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.write(unit(0), batch(0))
        size = path.stat().st_size

        def full(_: int) -> None:
            raise OSError(28, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="no space"):
                journal.write(unit(1), batch(1))
        assert path.stat().st_size == size
        journal.write(unit(1), batch(1))
    assert read_attempts(path) == batch(0) + batch(1)


WRITER = """
import sys
from lcguard.evaluation.outcomes import Attempt, Journal

def attempts(i):
    return [
        Attempt(scenario="s", edge="a->b", record=f"r{j}", guard="gate", policy="p",
                attack="probe", seed=i, category="salary", field=f"f{j}", kind="attack",
                outcome="success" if (i + j) % 3 == 0 else "resisted", score=j / 50,
                extra={"j": j})
        for j in range(50)
    ]

with Journal(sys.argv[1]) as journal:
    print("ready", flush=True)
    for i in range(int(sys.argv[2])):
        unit = {"guard": "gate", "policy": "p", "attack": "probe", "seed": i, "config_hash": "c"}
        if journal.done(unit) is None:
            journal.write(unit, attempts(i))
sys.stdin.read()  # who is to be killed does not end before, however late that comes
"""


def test_kill_minus_nine_and_resume_gives_the_same_attempts(tmp_path: Path) -> None:
    n_units = 100

    def start(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(path), str(n_units)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    left_alone, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = start(left_alone)
    process.communicate()
    assert process.returncode == 0
    size = left_alone.stat().st_size
    for part in sorted(random.SystemRandom().uniform(0, 0.8) for _ in range(2)):
        process = start(killed)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while killed.stat().st_size < part * size and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(killed)
    process.communicate()
    assert process.returncode == 0
    assert killed.read_bytes() == left_alone.read_bytes()
    assert len(read_attempts(killed)) == 50 * n_units


def test_replace_keeps_an_explicit_key() -> None:
    assert replace(attempt(key="k"), seed=7).key == "k"
