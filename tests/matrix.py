"""One row per registered guard and attack: name -> options small enough for a test.

Contract tests in test_guards.py and test_attacks.py fail for a registered name without a row, and
run every row through the properties that all guards, or all attacks, have.
"""

from __future__ import annotations

from typing import Any

from lcguard.categories import CATEGORIES

SOME = {"width": 32, "blocks": 1, "peak": 0.0, "thresholds": [1.5] * len(CATEGORIES)}
"""Of a detector that is not fitted: it finds something, and not everything."""

GUARDS: dict[str, dict[str, Any]] = {
    "identity": {},
    "gaussian": {"noise": 0.5},
    "residual": {"bottleneck": 4},
    "gate": {"width": 32, "blocks": 1, "words": 3, "noise": 0.1},
    "regress": {"width": 32, "blocks": 1, "noise": 0.2},
    "redact": {},
    "evict": {},
    "twin": {"width": 32, "blocks": 1},
    "trace_gate": {"detector": SOME, "width": 32, "blocks": 1, "rank": 4, "projected": 2},
    "kveraser": {"detector": SOME, "width": 32, "blocks": 1, "rank": 4},
    "erasure": {"values": 1},
    "compose": {
        "parts": [
            {"guard": "erasure", "options": {"values": 1}},
            {"guard": "gaussian", "options": {"noise": 0.3}},
        ]
    },
    "cloak": {"key": "5a" * 32, "block": 2},
}

ATTACKS: dict[str, dict[str, Any]] = {
    "decoder": {
        "width": 32,
        "max_tokens": 8,
        "token_every": 1,
        "fit": {"steps": 200, "batch": 48, "lr": 8e-3, "warmup": 10},
    },
    "probe": {"width": 96, "fit": {"steps": 200, "batch": 512, "lr": 3e-3, "warmup": 10}},
    "composition": {
        "width": 32,
        "max_tokens": 8,
        "token_every": 1,
        "max_segments": 4,
        "fit": {"steps": 200, "batch": 48, "lr": 8e-3, "warmup": 10},
    },
    "injection": {"max_tokens": 8},
    "inversion": {"shortlist": 16},
    "collision": {"max_records": 2, "calibration": 4},
    "gauss_newton": {"max_records": 2},
    "likelihood": {"lists": (4, 8), "max_records": 4, "calibration": 2},
    "linear": {"max_tokens": 1500},
    "gradient_prediction": {"records": 32, "steps": 50},
    "tuned_receiver": {
        "max_tokens": 8,
        "fit": {"steps": 60, "batch": 16, "lr": 1e-2, "warmup": 4},
    },
    "soft_prefix": {
        "max_tokens": 8,
        "width": 32,
        "fit": {"steps": 60, "batch": 16, "lr": 2e-4, "warmup": 4},
    },
    "trigger": {
        "length": 2,
        "max_perplexity": 5000.0,
        "rounds": 1,
        "candidates": 3,
        "records": 24,
        "width": 96,
        "fit": {"steps": 200, "batch": 512, "lr": 3e-3, "warmup": 10},
    },
}
