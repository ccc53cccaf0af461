"""The relay's own stream of a response, cut at every byte, behind a text hop and without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import TextField
from lcguard.server.gateway.response_events import ResponseEvents
from lcguard.server.gateway.sse import Events, named_data_of, named_event
from lcguard.server.gateway.text_pass import TextPass
from tests.server.gateway.test_text_stream import (
    ARGUMENTS,
    NAME,
    TEXT,
    WHO,
    Deployment,
    deployment,
    run,
)
from tests.text.policies import leaks
from tests.text.response_events import (
    call,
    cut_at,
    events,
    every_character,
    message,
    read,
    reasoning,
)

__all__ = ["deployment"]
ITEMS = [reasoning(f"They mean {NAME}."), message(TEXT), call(ARGUMENTS)]
WISH = {"audience": "billing", "secrets": [NAME]}


def recorded(told: list[dict[str, Any]]) -> bytes:
    return b"".join(map(named_event, told))


async def relayed(
    deployment: Deployment, wish: dict[str, Any] | None, pieces: list[bytes]
) -> tuple[Exchange, list[bytes], int | None]:
    """The exchange, what the client reads piece by piece, and the tokens that were counted."""
    sent: list[bytes] = []

    async def send(answer: Any) -> None:
        if answer["type"] == "http.response.body":
            sent.append(answer["body"])

    async def iter_any() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    x = Exchange({}, send, "request-1", "responses")
    x.who = WHO
    if wish is not None:
        x.text = TextPass(deployment.hops, TextField.model_validate(wish), WHO, "request-1")
        await x.text.allow_answer(())
    answer: Any = SimpleNamespace(status=200, content=SimpleNamespace(iter_any=iter_any))
    try:
        counted = await ResponseEvents(x, deployment.settlement).relay(answer, "text/event-stream")
    except ProxyError as error:
        await x.refuse(error)
        counted = None
    return x, sent, counted


def shown(sent: list[bytes]) -> list[dict[str, Any]]:
    return [named_data_of(raw) for raw in Events().feed(b"".join(sent))]


def test_no_cut_of_the_bytes_lets_a_value_pass(deployment: Deployment) -> None:
    raw = recorded(events(ITEMS, cut_at(2, 11, 12, 13), instructions=NAME))
    cuts = [*range(0, len(raw), 97), 1]

    async def work() -> list[Any]:
        pieces = [[raw[:at], raw[at:]] for at in cuts] + [[raw[i : i + 1] for i in range(len(raw))]]
        return [await relayed(deployment, WISH, some) for some in pieces]

    every = run(work)
    first = shown(every[0][1])
    for _, sent, counted in every:
        got = shown(sent)
        assert [e for e in got if leaks(e, NAME)] == []
        assert read(got) == read(first)
        assert counted == 39
    applied = {"text": {"audience": "billing", "hidden": {"TEXT": 4}}}
    assert first[-1]["response"]["lcguard"] == applied
    assert all("lcguard" not in str(e) for e in first[:-1])
    assert len(deployment.rows("text_guarded")) == len(every)


def test_without_a_handoff_it_is_vllm_s_own_byte_for_byte(deployment: Deployment) -> None:
    raw = recorded(events(ITEMS, every_character, instructions=NAME))
    _, sent, counted = run(lambda: relayed(deployment, None, [raw[:700], raw[700:]]))
    assert (b"".join(sent), counted) == (raw, 39)


@pytest.mark.parametrize("wish", [WISH, None], ids=["guarded", "plain"])
def test_a_stream_that_breaks_off_ends_with_an_error(
    deployment: Deployment, wish: dict[str, Any] | None
) -> None:
    raw = recorded(events(ITEMS, every_character)[:-1])
    x, sent, _ = run(lambda: relayed(deployment, wish, [raw]))
    last = shown(sent)[-1]
    assert (last["type"], last["code"]) == ("error", "upstream_broke_off")
    assert last["error"]["message"] == last["message"] == "vLLM broke off its answer"
    assert last["sequence_number"] == len(shown(sent)) - 1
    assert x.code == "upstream_broke_off"
    assert not deployment.rows("text_guarded")


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b'event: error\ndata: {"type":"error","message":"x"}\n\n', "upstream_error"),
        (b'data: {"error":{"message":"x"}}\n\n', "upstream_error"),
        (b"event: response.output_text.delta\ndata: Ada Long\n\n", "upstream"),
        (b'event: x\ndata: {"type":"x","delta":"Ada Long"}\n\n', "text"),
    ],
)
def test_what_is_no_event_of_an_answer_ends_it(
    deployment: Deployment, event: bytes, code: str
) -> None:
    raw = recorded(events(ITEMS, every_character)[:6]) + event
    x, sent, _ = run(lambda: relayed(deployment, WISH, [raw]))
    assert x.code == code
    last = shown(sent)[-1]
    assert last.get("type") == "error" or last["error"]
    assert not leaks(b"".join(sent).decode(), NAME)
    assert not deployment.rows("text_guarded")
    assert deployment.rows("failed") or code == "upstream"
