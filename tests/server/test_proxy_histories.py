"""Agents' histories through the proxy and the engine on an edge with guard ``redact``.

CI runs a share. All of them: ``LCGUARD_CAMPAIGN=1 pytest tests/server/test_proxy_histories.py``.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from tests.engine import needs_vllm
from tests.histories import SECRET, history
from tests.server.proxy import Front

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
N = 2000 if os.environ.get("LCGUARD_CAMPAIGN") else 40


def test_agents_histories_are_published_or_refused(front: Front) -> None:
    who, seen, why = front.auth("intake"), Counter[int](), Counter[str]()
    publish = {"publish": {"audience": "named", "secrets": [SECRET]}}
    for seed in range(N):
        body = history(seed) | {"max_tokens": 1, "lcguard": publish}
        # as a client's library writes it, lone surrogates escaped
        answer = front.http.post("/v1/chat/completions", content=json.dumps(body), headers=who)
        assert answer.status_code in (200, 400), (answer.text, json.dumps(body))
        seen[answer.status_code] += 1
        if answer.status_code == 400:
            why[answer.json()["error"]["message"][:70]] += 1
        else:
            assert answer.json()["lcguard"]["published"]["redacted_spans"] >= 1
    print(dict(seen))  # for whoever runs all of them, with -s
    # this engine has no parser for tools, which half of them name
    assert seen[200] > 0.25 * N, why.most_common(8)
