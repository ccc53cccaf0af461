"""Where figures come from, fit to publish."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcguard.evaluation.manifest import clean_command, run_manifest


def test_manifest_says_where_figures_come_from() -> None:
    found = run_manifest(["lcguard", "eval", "--out=/srv/a/b.json"], [0, 1], {"lr": 0.1})
    assert found["command"] == "lcguard eval --out=b.json"
    assert found["seeds"] == [0, 1]
    assert found["hardware"]["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__
    assert set(found["git"]) == {"revision", "dirty"}
    assert all(len(h) == 64 for h in found["hashes"].values())
    assert str(Path.home()) not in json.dumps(found)
    other = run_manifest("x", [0], {"lr": 0.2})["hashes"]
    assert other["config"] != found["hashes"]["config"]
    assert other["source"] == found["hashes"]["source"]
    with pytest.raises(ValueError, match="canonical JSON"):
        run_manifest("x", [0], {"lr": float("nan")})


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("eval ~/runs/a.yaml", "eval a.yaml"),
        ("eval --set out=/tmp/x/y --seed 3", "eval --set out=y --seed 3"),
        ("eval --url http://host.internal:8000/v1", "eval --url [url]"),
        ("eval --api-key abc --n 3", "eval --api-key [hidden] --n 3"),
        ("API_KEY=abc eval", "API_KEY=[hidden] eval"),
        ("eval --max-tokens 5 configs/nano.yaml", "eval --max-tokens 5 configs/nano.yaml"),
        (r"eval C:/Users/me/a.yaml", "eval a.yaml"),
    ],
)
def test_commands_are_fit_to_publish(given: str, shown: str) -> None:
    assert clean_command(given) == shown
