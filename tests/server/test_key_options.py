"""Every option of a key shows its effect."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lcguard.commands.keys import revoke
from lcguard.commands.live_servers import free_port
from lcguard.server.limits.key_limits import Limits
from tests.engine import needs_vllm
from tests.server.option_cases import FOREVER, error_of, stream
from tests.server.proxy import (
    Front,
    error,
    wait_for,
)

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


# --- keys ---


def test_a_new_key_works_and_a_revoked_one_does_not_without_a_restart(front: Front) -> None:
    keys = front.site.folder / "keys.yaml"
    text = front.site.key("temp")
    header = {"Authorization": f"Bearer {text}"}
    wait_for(lambda: front.chat(header, "hello").status_code == 200)
    revoke(keys, text.split("_")[1])
    wait_for(lambda: error_of(front.chat(header, "hello")) == (401, "unauthorized"))
    assert front.http.get("/lcguard/v1/contract", headers=header).status_code == 401


def test_a_key_expires(front: Front) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=5)
    who = front.auth("temp", expires_at=until)
    gone = wait_for(lambda: (r := front.chat(who, "hello")).status_code == 401 and r)
    assert datetime.now(UTC) >= until
    assert "expired" in gone.json()["error"]["message"]


def test_models_of_a_key(front: Front) -> None:
    names = {}
    for model in ("nano", "other"):
        who = front.auth("temp", models=(model,))
        found = front.http.get("/v1/models", headers=who).json()["data"]
        names[model] = [m["id"] for m in found]
        answer = front.chat(who, "hello")
        assert answer.status_code == (200 if model == "nano" else 403)
    assert names == {"nano": ["nano"], "other": []}
    assert error(answer) == (403, "model")


def test_a_key_for_some_models_has_to_name_one(front: Front) -> None:
    """vLLM takes its own model where a request names none."""
    who = front.auth("temp", models=("other",))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for model in ({}, {"model": None}, {"model": ""}):
        answer = front.http.post("/v1/chat/completions", json=body | model, headers=who)
        assert answer.status_code in (400, 403), answer.text


def test_requests_per_min(front: Front) -> None:
    who = front.auth("temp", limits=Limits(requests_per_min=2))
    answers = [front.chat(who, "hello") for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert error(answers[2]) == (429, "limited")


def test_tokens_per_min_counts_prompts_of_streams_too(front: Front) -> None:
    who = front.auth("temp", limits=Limits(tokens_per_min=500))
    assert error(front.chat(who, "hello", max_tokens=600)) == (413, "too_large")
    long = "word " * 220
    first = front.chat(who, long, max_tokens=4, stream=True)
    assert first.status_code == 200
    second = front.chat(who, long, max_tokens=4)
    assert error(second) == (429, "limited")
    assert 1 <= int(second.headers["retry-after"]) <= 60


def test_a_stream_that_is_left_is_not_free(front: Front) -> None:
    who = front.auth("temp", limits=Limits(tokens_per_min=FOREVER + 500))
    with stream(front, who) as answer:
        next(answer.iter_raw())
    admin = front.auth("root", role="admin")
    wait_for(lambda: "\nlcguard_in_flight 0.0\n" in front.http.get("/metrics", headers=admin).text)
    assert error(front.chat(who, "hello", max_tokens=1000)) == (429, "limited")


def test_prompt_log_probabilities_do_not_hide_the_count(front: Front) -> None:
    """vLLM writes them behind its count of tokens, and they are long."""
    who = front.auth("temp", limits=Limits(tokens_per_min=1000))
    body = {"prompt_logprobs": 5, "max_tokens": 4}
    assert front.complete(who, "word " * 600, **body).status_code == 200
    assert error(front.complete(who, "word " * 600, **body)) == (429, "limited")


def test_concurrency_of_a_key(front: Front) -> None:
    who = front.auth("temp", limits=Limits(concurrency=1))
    with stream(front, who):
        refused = front.chat(who, "hello")
        assert error(refused) == (429, "limited")
        assert int(refused.headers["retry-after"]) >= 1
        assert front.chat(front.auth("intake"), "hello").status_code == 200
    wait_for(lambda: front.chat(who, "hello").status_code == 200)


def test_the_port_is_free_to_choose(tmp_path: Path) -> None:
    from lcguard.commands.serve import load_settings

    port = free_port()
    settings = load_settings(tmp_path, None, [f"port={port}", "host=127.0.0.9"], None)
    assert (settings.host, settings.port) == ("127.0.0.9", port)
