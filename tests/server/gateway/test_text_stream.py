"""The relay's own stream on recorded events of vLLM's, cut at every byte, behind a text hop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.handoff.policy import parse_policy
from lcguard.server.access.keyring import Identity
from lcguard.server.audit.trail import AuditLog
from lcguard.server.authorization.authority import Authority
from lcguard.server.authorization.settlement import Settlement
from lcguard.server.authorization.text_hops import TextHops
from lcguard.server.database.writer import Database
from lcguard.server.detection.span_finder import SpanFinder
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import TextField
from lcguard.server.gateway.sse import DONE, Events, data_of, event
from lcguard.server.gateway.streaming import Stream
from lcguard.server.gateway.text_pass import TextPass
from lcguard.server.gateway.upstream import Upstream
from lcguard.server.leakage.meter import LeakageMeter
from lcguard.server.settings import UpstreamSettings
from lcguard.store.line import StoreLine
from lcguard.store.memory import MemoryStore
from tests.server.proxy_client import audit_rows
from tests.text.policies import KEY, leaks

NAME = "Ada Long"
TEXT = f"Zoë says: {NAME}, 東京, ada long and no more."
ARGUMENTS = json.dumps({"who": NAME, "n": 12})
POLICY = {
    "version": 1,
    "edges": [
        {"source": "intake", "audience": "billing", "channel": "text", "forbid": ["person"]},
        {"source": "desk", "audience": "intake", "channel": "text", "forbid": ["person"]},
        {"source": "desk", "audience": "billing", "channel": "text", "forbid": ["contact"]},
    ],
}
WHO = Identity("key", "default", "intake", "agent")


class Deployment:
    """The parts of a proxy that a text hop needs, all real; there is no engine."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.path = folder / "lcguard.sqlite"
        database = stack.enter_context(Database(self.path))
        store, line = MemoryStore(), StoreLine(5.0)
        stack.callback(line.close)
        spans = SpanFinder(Upstream(UpstreamSettings(), "http://127.0.0.1:9", ""), "")
        stack.callback(spans.close)
        audit = AuditLog(database, KEY)
        meter = LeakageMeter(database, 0.2, 3600.0)
        self.settlement = Settlement(store, line, KEY, audit)
        self.hops = TextHops(Authority(parse_policy(POLICY), store, line, KEY, audit, meter, spans))

    def rows(self, *events: str) -> list[dict[str, Any]]:
        return [r for r in audit_rows(self.path) if r["event"] in events]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with ExitStack() as stack:
        yield Deployment(tmp_path, stack)


def recorded() -> bytes:
    """As vLLM 0.32 sends an answer with reasoning, text and a tool call."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning": r} for r in ("They mean Ada", " Long", ".")]
    deltas += [{"content": TEXT[i : i + 5]} for i in range(0, len(TEXT), 5)]
    head = {"index": 0, "id": "call_1", "type": "function"}
    deltas.append({"tool_calls": [{**head, "function": {"name": "find", "arguments": ""}}]})
    deltas += [
        {"tool_calls": [{"index": 0, "function": {"arguments": ARGUMENTS[i : i + 7]}}]}
        for i in range(0, len(ARGUMENTS), 7)
    ]
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "nano"}
    out = [
        event({**base, "choices": [{"index": 0, "delta": d, "finish_reason": None}]})
        for d in deltas
    ]
    last = {"index": 0, "delta": {}, "finish_reason": "tool_calls", "stop_reason": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 30, "total_tokens": 39}
    out.append(event({**base, "choices": [last]}))
    out.append(event({**base, "choices": [], "usage": usage}))
    return b"".join([*out, DONE])


async def relayed(
    deployment: Deployment, wish: dict[str, Any], pieces: list[bytes]
) -> tuple[bytes, list[bytes]]:
    """What the client reads, whole and piece by piece."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    async def iter_any() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    x = Exchange({}, send, "request-1")
    x.who = WHO
    x.text = TextPass(deployment.hops, TextField.model_validate(wish), WHO, "request-1")
    await x.text.allow_answer(())
    body: dict[str, Any] = {"stream": True}
    answer: Any = SimpleNamespace(status=200, content=SimpleNamespace(iter_any=iter_any))
    await Stream(x, deployment.settlement, body).relay(answer, "text/event-stream")
    return b"".join(sent), sent


def read(data: bytes) -> dict[str, Any]:
    """The message as a client puts it together."""
    out: dict[str, Any] = {"content": "", "reasoning": "", "arguments": ""}
    for raw in Events().feed(data):
        for choice in (data_of(raw) or {}).get("choices", ()):
            delta = choice["delta"]
            out["content"] += delta.get("content") or ""
            out["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                out["arguments"] += call["function"]["arguments"]
            out |= {"lcguard": delta["lcguard"]} if "lcguard" in delta else {}
    return out


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(work())


def test_no_cut_of_the_bytes_lets_a_value_pass(deployment: Deployment) -> None:
    raw, wish = recorded(), {"audience": "billing", "secrets": [NAME]}

    async def work() -> list[dict[str, Any]]:
        cuts = range(0, len(raw), 7)
        return [read((await relayed(deployment, wish, [raw[:at], raw[at:]]))[0]) for at in cuts]

    every = run(work)
    first = every[0]
    assert all(got == first for got in every)
    assert not leaks(first, NAME)
    mark = json.loads(first["arguments"])["who"]
    assert first["content"] == f"Zoë says: {mark}, 東京, {mark} and no more."
    assert first["reasoning"] == f"They mean {mark}."
    assert json.loads(first["arguments"]) == {"who": mark, "n": 12}
    assert first["lcguard"] == {"text": {"audience": "billing", "hidden": {"TEXT": 4}}}


def test_events_of_one_byte_each(deployment: Deployment) -> None:
    raw, wish = recorded(), {"audience": "billing", "secrets": [NAME]}
    data, pieces = run(lambda: relayed(deployment, wish, [raw[i : i + 1] for i in range(len(raw))]))
    assert data.endswith(DONE)
    assert b"Zo" in pieces[2] + pieces[3] + pieces[4] + pieces[5], "it is sent before the end"
    assert not leaks(read(data), NAME)
    assert b"usage" not in data


def test_the_audit_has_the_hop_and_what_was_hidden(deployment: Deployment) -> None:
    run(lambda: relayed(deployment, {"audience": "billing", "secrets": [NAME]}, [recorded()]))
    got = [
        (r["event"], r["source"], r["audience"], r["reason"])
        for r in deployment.rows("text", "text_guarded")
    ]
    assert got == [
        ("text", "intake", "billing", ""),
        ("text_guarded", "intake", "billing", "4 values hidden"),
    ]


def test_a_stream_that_breaks_off_sends_nothing_more(deployment: Deployment) -> None:
    raw = recorded()
    wish = {"audience": "billing", "secrets": [NAME]}

    async def work() -> None:
        with pytest.raises(ProxyError, match="broke off"):
            await relayed(deployment, wish, [raw[: len(raw) // 2]])

    run(work)
    assert not deployment.rows("text_guarded")


def test_restrictions_travel_from_the_prompt_to_the_answer(deployment: Deployment) -> None:
    """What desk may not tell billing, and intake read from desk, intake does not pass on."""

    async def work(declared: bool) -> Any:
        more = {"source": "desk"} if declared else {}
        wish = TextField(audience="billing", secrets=(NAME,), **more)
        hop = TextPass(deployment.hops, wish, WHO, "r")
        body = {"messages": [{"role": "user", "content": f"{NAME} is here"}], "max_tokens": 8}
        made = await hop.request("chat", body)
        assert leaks(made, NAME) == [] if declared else made is body
        await hop.allow_answer(())
        found = hop._outgoing
        assert found is not None
        return found.edge.forbid

    assert run(lambda: work(False)) == ("person",)
    assert set(run(lambda: work(True))) == {"person", "contact"}


def test_a_prompt_of_tokens_is_refused(deployment: Deployment) -> None:
    async def work() -> None:
        wish = TextField(source="desk", secrets=())
        with pytest.raises(ProxyError, match="prompt: send text"):
            await TextPass(deployment.hops, wish, WHO, "r").request(
                "completions", {"prompt": [1, 2, 3]}
            )

    run(work)
    assert deployment.rows("failed")
