"""``lcguard.detect``: the real model and its shipped detector, on text alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lcguard
from lcguard.cli import app
from lcguard.commands.text_detector import WINDOW_TOKENS, _windows

NOTE = (
    "Patient: Bob Martinez\nSSN: 912-55-1029\nPhone: (555) 201-7733\n"
    "Diagnosis: major depressive disorder, he takes sertraline.\n"
    "The next visit is in spring, in the house by the river.\n"
)


def found(text: str, *categories: str) -> dict[str, str]:
    spans = lcguard.detect(text, categories) if categories else lcguard.detect(text)
    assert spans == sorted(spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    return {text[s.start : s.end]: s.category for s in spans}


def test_values_are_found_with_their_categories() -> None:
    values = found(NOTE)
    assert values["Bob Martinez"] == "person"
    assert values["912-55-1029"] == "government_id"
    assert values["(555) 201-7733"] == "contact"
    assert "health" in values.values()
    assert not any("river" in v for v in values)


def test_only_what_is_asked_for() -> None:
    assert found(NOTE, "person") == {"Bob Martinez": "person"}
    assert lcguard.detect(NOTE, ()) == []
    with pytest.raises(ValueError, match="category 'heath' is unknown: did you mean 'health'"):
        lcguard.detect(NOTE, ["heath"])


@pytest.mark.parametrize("text", ["", "  \n "])
def test_no_text_no_spans(text: str) -> None:
    assert lcguard.detect(text) == []


def test_as_a_person_reads_it() -> None:
    """Full-width digits and invisible characters are no other number."""
    odd = "\uff19\uff11\uff12\u2011\uff15\u200b\uff15\u2011\uff11\uff10\uff12\uff19"
    values = found(NOTE.replace("912-55-1029", odd), "government_id")
    assert any(odd in value for value in values)


def test_a_long_text_is_read_in_pieces() -> None:
    filler = "The team met and spoke about the plan for the garden. " * 120
    values = found(filler + NOTE + filler + "Her name is Alice Whitfield.", "person")
    assert {"Bob Martinez", "Alice Whitfield"} <= set(values)


@pytest.mark.parametrize("n", [0, 1, WINDOW_TOKENS, WINDOW_TOKENS + 1, 5000])
def test_the_pieces_cover_every_token(n: int) -> None:
    windows = list(_windows(7, 7 + n))
    assert {i for a, b in windows for i in range(a, b)} == set(range(7, 7 + n))
    assert all(b - a <= WINDOW_TOKENS for a, b in windows)


def test_eval_without_a_model_measures_it(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = ["detect", "eval", "--source", "generator", "--records", "12", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "task spans touched" in done.output
    figures = json.loads(out.read_text())
    assert figures["model"] is None
    assert figures["total"] > 10
    assert figures["recall"] > 0.9
    assert figures["task_touched"] < 0.3
