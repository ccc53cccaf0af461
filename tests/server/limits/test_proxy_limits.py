"""Limits hold for what vLLM generates, whatever way a request asks for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lcguard.commands.live_servers import Running, Site
from lcguard.server.limits.key_limits import Limits
from tests.engine import needs_vllm
from tests.server.proxy import Front, error, front_of

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

MOST = 32
ENDLESS = {"ignore_eos": True, "max_tokens": None}


@pytest.fixture(scope="module")
def small(site: Site, engine: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy under which a request generates few tokens."""
    with front_of(
        site,
        engine,
        tmp_path_factory.mktemp("small"),
        limits={"max_output_tokens": MOST},
    ) as found:
        yield found


def generated(answer: httpx.Response) -> int:
    """By vLLM's own count."""
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_all_that_one_request_generates_counts(small: Front) -> None:
    who = small.auth("intake")
    assert generated(small.chat(who, "hello", **ENDLESS)) == MOST
    assert generated(small.chat(who, "hello", n=4, temperature=1, **ENDLESS)) == MOST
    assert generated(small.complete(who, ["a"] * 8, **ENDLESS)) == MOST
    halves = {"n": 2, "temperature": 1, "ignore_eos": True, "max_tokens": MOST // 2}
    assert generated(small.chat(who, "hello", **halves)) == MOST
    for body in (
        {"n": 64, "max_tokens": MOST},
        {"n": 64, "max_tokens": None},
        {"max_tokens": MOST + 1},
        {"max_completion_tokens": MOST + 1},
    ):
        assert error(small.chat(who, "hello", **body)) == (400, "max_tokens"), body
    assert error(small.complete(who, ["a"] * 200)) == (400, "max_tokens")
    assert error(small.complete(who, ["a"] * 200, **ENDLESS)) == (400, "max_tokens")


def events(answer: httpx.Response) -> list[Any]:
    lines = answer.text.split("\n\n")
    return [json.loads(x[6:]) for x in lines if x.startswith("data: {")]


def test_pieces_of_a_stream_are_not_what_is_counted(small: Front) -> None:
    """Sent in one piece, a stream is charged as much: 40 of them are more than a quarter of an
    hour's worth."""
    who = small.auth("temp", limits=Limits(tokens_per_min=100))
    stream = {"stream": True, "stream_interval": MOST, "ignore_eos": True, "max_tokens": MOST}
    answers = [small.complete(who, "a", **stream) for _ in range(40)]
    statuses = [a.status_code for a in answers]
    assert statuses[0] == 200
    assert 429 in statuses
    assert set(statuses) == {200, 429}
    assert len(events(answers[0])) < MOST / 4, "it did not come in large pieces"


def test_the_count_that_nobody_asked_for_is_not_shown(small: Front) -> None:
    who = small.auth("intake")
    plain = events(small.complete(who, "a", stream=True, max_tokens=3))
    assert all(e["choices"] and not e.get("usage") for e in plain)
    asked = small.complete(
        who, "a", stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    *pieces, last = events(asked)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert [e["choices"][0]["text"] for e in pieces] == [e["choices"][0]["text"] for e in plain]
