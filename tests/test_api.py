"""The public API: a dozen names, loaded when used, that a first program needs nothing beyond."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lcguard
from lcguard.agents.backends.hf import HFBackend
from lcguard.categories import CATEGORIES
from lcguard.guards import FrozenGuard, GuardError, KVShape, guard_class
from lcguard.handoff.redaction import RedactionError
from lcguard.records import mask_of
from lcguard.rule import Rule

NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
SECRETS = ["Ada Long", "912-55-1029"]
KEYS = [b"0" * 32]


@pytest.fixture(scope="module")
def agent() -> HFBackend:
    return lcguard.load_agent("nano")


@pytest.fixture(scope="module")
def gate(agent: HFBackend) -> FrozenGuard:
    return lcguard.load_guard("nano:gate", agent)


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'numpy'} & {*sys.modules}"
    code = f"import sys, lcguard; dir(lcguard); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", lcguard.__all__)
def test_every_name_is_there_and_described(name: str) -> None:
    found = getattr(lcguard, name)
    assert callable(found) is (name not in ("CATEGORIES", "__version__"))
    assert not callable(found) or found.__doc__
    assert name == "__version__" or f"``{name}``" in str(lcguard.__doc__)


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_gaurd'"):
        _ = lcguard.load_gaurd


def test_one_line_guards_what_the_names_say(agent: HFBackend, gate: FrozenGuard) -> None:
    kv = agent.read(NOTE)
    short = gate(kv, forbid=["person", "government_id"], keys=KEYS).kv
    full = gate(kv, mask_of([Rule(("person", "government_id"))]), keys=KEYS).kv
    assert short.keys.equal(full.keys)
    assert agent.answer(kv, "What is the SSN?") == "912-55-1029"
    assert agent.answer(short, "What is the SSN?") != "912-55-1029"
    assert agent.answer(short, "What is the chief complaint?") == "back pain"


def test_where_nothing_is_named_everything_is_hidden(agent: HFBackend, gate: FrozenGuard) -> None:
    kv = agent.read(NOTE)
    everything = gate(kv, forbid=lcguard.CATEGORIES, keys=KEYS).kv
    assert gate(kv, keys=KEYS).kv.keys.equal(everything.keys)
    assert not gate(kv, forbid=[], keys=KEYS).kv.keys.equal(everything.keys)


def test_what_contradicts_or_is_unknown_is_refused(agent: HFBackend, gate: FrozenGuard) -> None:
    kv = agent.read(NOTE)
    with pytest.raises(GuardError, match=r"category 'helth' is unknown: did you mean 'health'\?"):
        gate(kv, forbid=["helth"])
    with pytest.raises(GuardError, match="give one"):
        gate(kv, mask_of([Rule()]), forbid=["health"])


def test_redact_sends_the_text_without_its_secrets(agent: HFBackend) -> None:
    redact = lcguard.load_guard("redact", agent)
    with pytest.raises(GuardError, match="twin"):
        redact(agent.read(NOTE))
    sent = redact(agent.read(NOTE), twin=agent.read(NOTE, hide=SECRETS)).kv
    other = NOTE.replace("912-55-1029", "733-81-4406")
    same = agent.read(other, hide=["Ada Long", "733-81-4406"])
    assert sent.keys.equal(same.keys)
    assert agent.answer(sent, "What is the chief complaint?") == "back pain"
    with pytest.raises(RedactionError, match="not in the prompt"):
        agent.read(NOTE, hide=["Bob Short"])


def test_guards_are_loaded_by_name_or_folder(agent: HFBackend, tmp_path: Path) -> None:
    assert lcguard.load_guard("gaussian", agent, noise=0.5).module.config.noise == 0.5
    lcguard.load_guard("nano:gate", agent).save_pretrained(tmp_path / "gate")
    assert lcguard.load_guard(str(tmp_path / "gate"), agent).name == "gate"
    with pytest.raises(ValueError, match="its own options"):
        lcguard.load_guard("nano:gate", agent, noise=0.5)
    with pytest.raises(ValueError, match="did you mean 'nano:gate'"):
        lcguard.load_guard("nano:gaet", agent)


def test_the_placeholder_of_a_saved_guard_can_be_chosen(agent: HFBackend, tmp_path: Path) -> None:
    shape, path = KVShape(*agent.source.shape), str(tmp_path / "twin")
    module = guard_class("twin").build(shape, len(CATEGORIES), {"width": 32, "blocks": 1})
    FrozenGuard(module).with_card(model_digest=agent.digest).save_pretrained(path)
    plain, other = (
        lcguard.load_guard(path, agent, **options) for options in ({}, {"placeholder": "surrogate"})
    )
    assert (plain.placeholder, other.placeholder) == ("neutral", "surrogate")
    assert plain.digest != other.digest
    kv, mask = agent.read(NOTE), mask_of([Rule.of(CATEGORIES, ())])
    assert torch.equal(plain.module.logits(kv), other.module.logits(kv))
    # everything is found: what is sent has other values, and other ones each time
    other.module.thresholds.fill_(-1e9)
    other.module.config = replace(other.module.config, peak=0.0)
    assert bool((other.marks(kv, mask) >= 0).all())
    sent = [agent.publish(NOTE, other) for _ in range(4)]
    assert len({tuple(kv.keys.flatten().tolist()) for kv in sent}) > 1
    with pytest.raises(ValueError, match="placeholder 'stars' is unknown"):
        lcguard.load_guard(path, agent, placeholder="stars")
    with pytest.raises(ValueError, match="its placeholder can be chosen: leave out width"):
        lcguard.load_guard(path, agent, width=64)


def test_an_evaluation_runs_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        "data: {train_records: 24, test_records: 8}\n"
        "guards: [{name: identity, guard: identity}]\n"
        "attacks: [{name: probe, attack: probe, options: {fit: {steps: 2}}}]\n"
        "injection: false\n"
    )
    report = lcguard.evaluate(config, tmp_path / "run", sets=["title=Small"])
    assert report["title"] == "Small"
    assert report["command"] == "lcguard eval run small.yaml --out run --set title=Small"
    assert (tmp_path / "run" / "report.html").exists()
