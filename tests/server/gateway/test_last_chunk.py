"""The chunk that ends a stream as vLLM 0.33 sends it: with the engine's own word on the handoff,
grant included, which is for the proxy and for no client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.server.authorization.approved_handoff import ApprovedHandoff
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import TextField
from lcguard.server.gateway.sse import DONE, Events, data_of, event
from lcguard.server.gateway.streaming import Stream
from lcguard.server.gateway.text_pass import TextPass
from tests.server.gateway.test_text_stream import WHO, Deployment, deployment, run

__all__ = ["deployment"]
TOLD = {"lcguard": {"handle": "h" * 32, "grant": "1.x", "audience": "default/billing"}}
SPANS = [{"version": "default", "start": 0, "end": 2}]


def chunks(text: bool) -> list[dict[str, Any]]:
    """Of a text completion or a chat, usage last."""
    said = [{"text": t} if text else {"delta": {"content": t}} for t in ("so ", "it is")]
    base = {"id": "cmpl-1", "object": "chunk", "created": 1, "model": "nano"}
    ends: list[dict[str, Any]] = [{"finish_reason": None}, {"finish_reason": "stop"}]
    out = [
        {**base, "choices": [{"index": 0, **part, **end}]}
        for part, end in zip(said, ends, strict=True)
    ]
    out[-1]["choices"][0]["weight_versions"] = SPANS
    out[-1]["kv_transfer_params"] = TOLD
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    return [*out, {**base, "choices": [], "usage": usage, "kv_transfer_params": None}]


async def relayed(
    deployment: Deployment, raw: bytes, size: int, usage: bool, handoff: str
) -> bytes:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    async def iter_any() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), size):
            yield raw[at : at + size]

    x = Exchange({}, send, "request-1")
    x.who = WHO
    if handoff == "kv":
        x.approved = ApprovedHandoff(WHO, "request-1", {})
    else:
        wish = TextField.model_validate({"audience": "billing", "secrets": []})
        x.text = TextPass(deployment.hops, wish, WHO, "request-1")
        await x.text.allow_answer(())
    body: dict[str, Any] = {"stream": True}
    body |= {"stream_options": {"include_usage": True}} if usage else {}
    answer: Any = SimpleNamespace(status=200, content=SimpleNamespace(iter_any=iter_any))
    counted = await Stream(x, deployment.settlement, body).relay(answer, "text/event-stream")
    assert counted == 11
    return b"".join(sent)


@pytest.mark.parametrize("handoff", ["kv", "text"])
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_the_engine_s_word_stays_with_the_proxy(
    deployment: Deployment, handoff: str, usage: bool, text: bool, size: int
) -> None:
    raw = b"".join([*map(event, chunks(text)), DONE])
    got = run(lambda: relayed(deployment, raw, size, usage, handoff))
    assert b"kv_transfer_params" not in got
    assert TOLD["lcguard"]["handle"].encode() not in got
    events = [data_of(e) for e in Events().feed(got) if e != DONE]
    (last,) = (e for e in events if any(c.get("finish_reason") for c in e["choices"]))
    assert last["choices"][0]["weight_versions"] == SPANS
    assert "lcguard" in last
    assert json.dumps(events).count("usage") == usage
