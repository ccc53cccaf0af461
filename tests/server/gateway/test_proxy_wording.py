"""What others say, vLLM above all, goes to the client that asked and nowhere else."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from lcguard.server.crashes import Crashes, unforeseen
from lcguard.server.engine import last_reason
from lcguard.server.errors import ProxyError
from tests.engine import needs_vllm
from tests.server.proxy import Front
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
MARK = "912-55-1029"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"ssn": MARK}}}
SAID: list[dict[str, Any]] = [
    {"messages": [{"role": "assistant", "tool_calls": [{"ssn": MARK}]}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [TOOL | {"id": [MARK]}]}]},
    {"messages": [{"role": MARK, "content": "x"}]},
    {"messages": [{"role": "tool", "content": MARK, "tool_call_id": MARK}]},
    {"messages": [{"role": "user", "content": MARK}], "tools": [{"ssn": MARK}]},
    {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": {MARK: MARK}},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": MARK}},
    {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"ssn": MARK}},
    {"messages": [{"role": "user", "content": "x"}], "logit_bias": {MARK: 5}},
    {"messages": [{"role": "user", "content": "x"}], "reasoning_effort": MARK},
    {
        "messages": [{"role": "user", "content": MARK}],
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
]
"""Bodies that somebody refuses and may quote."""


@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_no_wording_of_others_in_audit_log_and_metrics(front: Front) -> None:
    intake, folder = front.auth("intake"), front.running.log.parent
    before = len(audit_rows(folder / "lcguard.sqlite"))
    quoted = 0
    for body in SAID:
        for audience in ("hidden", "screened", "named"):
            whole = {"model": "nano", "max_tokens": 1} | body
            for publish in ({}, {"secrets": [MARK]}, {"secrets": ["not there"]}):
                made = {"lcguard": {"publish": {"audience": audience} | publish}}
                got = front.http.post("/v1/chat/completions", json=whole | made, headers=intake)
                quoted += got.status_code != 200 and MARK in got.text
    assert quoted, "nobody quotes the request: the test shows nothing"
    assert len(audit_rows(folder / "lcguard.sqlite")) > before
    front.http.get("/readyz")
    admin = front.auth("root", role="admin")
    for name, data in {
        **{p.name: p.read_bytes() for p in folder.glob("lcguard.sqlite*")},
        "log": front.running.log.read_bytes(),
        "metrics": front.http.get("/metrics", headers=admin).content,
        "dashboard": front.http.get("/dashboard", headers=admin).content,
    }.items():
        assert MARK.encode() not in data, name


@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_vllms_refusal_of_a_prompt_is_audited_without_its_words(front: Front) -> None:
    """The row is there, with its code."""
    body = {
        "model": "nano",
        "max_tokens": 1,
        **SAID[0],
        "lcguard": {"publish": {"audience": "screened"}},
    }
    header = front.auth("intake") | {"x-request-id": "quoted-1"}
    got = front.http.post("/v1/chat/completions", json=body, headers=header)
    assert got.status_code == 400
    (row,) = audit_rows(front.running.log.parent / "lcguard.sqlite", "request_id = ?", "quoted-1")
    assert row["event"] == "refused"
    assert row["reason"].split(":")[0] == got.json()["error"]["code"]


@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("token", [-1, 10**6, 2**40])
def test_a_token_that_is_none_is_refused_and_audited(front: Front, token: int) -> None:
    header = front.auth("intake") | {"x-request-id": f"token.{token}"}
    publish = {"publish": {"audience": "named", "secrets": []}}
    body = {"model": "nano", "prompt": [5, token], "max_tokens": 1, "lcguard": publish}
    got = front.http.post("/v1/completions", json=body, headers=header)
    assert got.status_code == 400
    database = front.running.log.parent / "lcguard.sqlite"
    (row,) = audit_rows(database, "request_id = ?", f"token.{token}")
    assert (row["event"], row["verdict"]) == ("refused", "blocked")


def test_a_detail_is_in_the_body_alone() -> None:
    error = ProxyError(400, "vLLM answered 400", detail=f"input_value={MARK}", code="upstream")
    assert MARK in error.body()["error"]["message"]
    assert MARK not in error.message + str(error) + repr(error)


def test_an_unforeseen_error_is_logged_by_place(caplog: pytest.LogCaptureFixture) -> None:
    def quotes() -> None:
        raise ValueError(f"input_value={MARK}")

    with caplog.at_level(logging.ERROR):
        try:
            quotes()
        except ValueError as error:
            found = unforeseen("a route", error)
    assert found.status == 500
    assert "ValueError" in caplog.text
    assert "in quotes" in caplog.text
    assert MARK not in caplog.text.replace('f"input_value={MARK}"', "") + found.whole


@pytest.mark.parametrize("begun", [False, True])
def test_a_route_that_fails_answers_and_logs_no_message(
    caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    sent: list[Any] = []

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError(f"input_value={MARK}")

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    with caplog.at_level(logging.ERROR):
        asyncio.run(Crashes(fails)({"type": "http"}, receive, send))
    assert [m["status"] for m in sent if "status" in m] == [200 if begun else 500]
    assert "ValueError" in caplog.text
    assert MARK not in caplog.text + str(sent)


def test_only_this_start_of_the_engine_gives_a_reason(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"ValueError: Error: input_value={MARK}\n")
    start = log.stat().st_size
    assert MARK in last_reason(log)
    assert last_reason(log, start).startswith("no reason in its log")
