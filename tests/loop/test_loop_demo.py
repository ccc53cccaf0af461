"""``lcguard loop --demo`` on less: a leak is found and repaired, and stays so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lcguard.commands.loop_demo import DemoConfig, demo
from lcguard.commands.loop_round import LoopLog
from lcguard.commands.loop_screen import ScreenConfig
from lcguard.deployment_key import KEY_VARIABLE
from lcguard.evaluation.plan import AttackSpec, DataConfig
from lcguard.guards.registry import Registry

pytestmark = pytest.mark.slow
KEY = "ef" * 32


def small() -> DemoConfig:
    config = DemoConfig()
    part = config.round
    probe = AttackSpec("probe", "probe", {"fit": {"steps": 150, "batch": 512}})
    return replace(
        config,
        careless_records=40,
        careless_steps=4,
        round=replace(
            part,
            limit=0.1,  # fewer records say less: what leaks whole has to show all the same
            hard_records=80,
            utility_share=0.8,
            certificate_pairs=24,
            screen=ScreenConfig(train_records=40, test_records=32),
            train=replace(
                part.train,
                data=DataConfig(seed=5000, train_records=80, test_records=24),
                train=replace(
                    part.train.train,
                    steps=50,
                    label_steps=30,
                    hard_steps=34,
                    batch=10,
                    certificate_pairs=24,
                ),
            ),
            judge=replace(
                part.judge,
                data=DataConfig(train_records=90, test_records=50),
                attacks=(probe,),
            ),
        ),
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> LoopLog:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        return demo(small(), tmp_path_factory.mktemp("demo") / "loop", lambda text: None)


def test_the_log_tells_the_story(log: LoopLog) -> None:
    rows = log.rows()
    assert [r["step"] for r in rows] == [
        "deploy",
        "canaries",
        *("collect", "train", "judge", "promote", "canaries"),
        *("judge", "keep"),
        *("judge", "keep"),
        *("promote", "canaries", "watch", "canaries"),
        "end",
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row)
    assert [r["state"] for r in found["canaries"]] == ["closed", "open", "closed", "open"]
    assert [r["version"] for r in found["canaries"]] == ["v1", "v2", "v4", "v2"]
    (leak,) = found["collect"]
    assert leak["categories"] == ["contact"]
    (trained,) = found["train"]
    assert trained["attacker_steps"] >= trained["measured_steps"] > 0
    candidate, poisoned, damaged = (r["judgement"] for r in found["judge"])
    assert candidate["accepted"]
    assert "health leaks" in poisoned["reason"]
    assert "altered or cut" in damaged["reason"]
    assert found["watch"][0]["outcome"].startswith("rollback: v2 is live")


def test_the_registry_says_the_same(log: LoopLog) -> None:
    out = log.path.parent
    registry = Registry(out / "guards", bytes.fromhex(KEY))
    state = registry.state
    assert state.live == "v2"
    assert registry.verify() == []
    v1, v2, refused, forced = state.versions
    assert (v2.parent, forced.parent) == (v1.digest, v2.digest)
    assert v1.withdrawn.startswith("leaked on default/intake/billing")
    assert not refused.judgement.accepted
    assert "planted secrets read" in forced.withdrawn
    assert len(registry.marks(v2)) > len(registry.marks(v1)) > 0
    report = json.loads((out / "round1" / "judged.json").read_text())
    assert report["digest"] == v2.digest
    assert set(report["judgement"]["figures"]["categories"]) >= {"contact", "health"}


def test_a_demo_is_not_run_over_another(log: LoopLog) -> None:
    with pytest.raises(ValueError, match="holds a demo that was run"):
        demo(small(), log.path.parent, lambda text: None)
