"""500 values in every place of a chat, a response and a tool round, through a running proxy: none
reaches who must not read it, every JSON argument parses, and nothing else is lost.

The engine behind it is a small server on loopback that says what it is told to, in vLLM's form: a
model would have to be persuaded to write each value.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lcguard.commands.live_servers import Site
from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_fields import PATHS
from lcguard.server.gateway.sse import DONE, Events, event, named_data_of, named_event
from tests.server.proxy import Front
from tests.text import planting, response_events
from tests.text.policies import PATTERN, TERMS, leaks
from tests.text.response_planting import ITEMS, MESSAGES, REQUESTS
from tests.text.test_answer_stream import chunks, read

N, SEED = 500, 21
_CHAT = {
    name: (lambda t, w, make=make: {"messages": [make(t, w)]})
    for name, make in planting.PLACES.items()
    # the first two are none of the contract's, broken JSON is looked through as text
    if name not in ("function_call", "result's item", "broken arguments")
}
WHERE = [
    *(("request", "chat", place, make) for place, make in _CHAT.items()),
    *(("request", "responses", place, make) for place, make in REQUESTS.items()),
    *((way, "chat", p, m) for way in ("answer", "stream") for p, m in MESSAGES.items()),
    *((way, "responses", p, m) for way in ("answer", "stream") for p, m in ITEMS.items()),
]
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z0-9_]*-[0-9a-f]{24}\]")


def _edge(source: str, audience: str, forbid: list[str]) -> dict[str, Any]:
    return {"source": source, "audience": audience, "forbid": forbid, "channel": "text"}


POLICY = {
    "version": 1,
    "categories": {"project": {"terms": [*TERMS], "patterns": [PATTERN]}},
    "edges": [
        _edge("desk", "clerk", ["project"]),
        _edge("clerk", "desk", ["project"]),
        # without a pattern: its streams go on as they come
        _edge("clerk", "press", []),
    ],
}


@dataclass(frozen=True)
class Case:
    """One value in one place."""

    number: int
    way: str
    endpoint: Any
    place: str
    value: str
    written: str
    named: bool
    sent: Any
    """Fields of a request, a chat's message or a response's items."""

    @property
    def audience(self) -> str:
        return "press" if self.named and self.number % 3 else "desk"

    def __str__(self) -> str:
        return f"{self.way}, {self.endpoint}, {self.place}: {self.written!r}"


def cases() -> Iterator[Case]:
    draw = random.Random(SEED)
    for number in range(N):
        way, endpoint, place, make = WHERE[number % len(WHERE)]
        own = draw.random() < 0.4
        value = planting._own(draw) if own else draw.choice(planting.VALUES)(draw)
        written = draw.choice(planting.SPELLINGS)(value)
        text = f"{planting._prose(draw)} {written} {planting._prose(draw)}"
        yield Case(number, way, endpoint, place, value, written, not own, make(text, written))


class Scripted(ThreadingHTTPServer):
    """Answers a request by its seed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.read: dict[int, dict[str, Any]] = {}
        """Bodies of requests."""
        self.says: dict[int, bytes] = {}
        """Bodies of answers; those of streams are sent in pieces."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, Scripted)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        seed = int(body.get("seed", -1))
        self.server.read[seed] = body
        stream, data = body.get("stream"), self.server.says.get(seed, b"{}")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if stream else "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        draw, at = random.Random(seed), 0
        while at < len(data):
            piece = data[at : at + (draw.randint(1, 900) if stream else len(data))]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            at += len(piece)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def engine() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def front(engine: Scripted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    site = Site(tmp_path_factory.mktemp("planted"), POLICY)
    site.key("nobody")
    there = {"url": f"http://127.0.0.1:{engine.server_port}", "retries": 0}
    with site.proxy(None, ready=False, upstream=there) as running:
        running.wait("/livez")
        with Front(site, running) as found:
            found.auth("clerk")
            yield found


@pytest.fixture(scope="module")
def outcomes(front: Front, engine: Scripted) -> list[tuple[Case, Any, Any]]:
    """Each case, what was sent as it is without a guard, and what its reader gets."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda case: _passed(front, engine, case), cases()))


def _passed(front: Front, engine: Scripted, case: Case) -> tuple[Case, Any, Any]:
    secrets = [case.value] if case.named else []
    body: dict[str, Any] = {"model": "nano", "seed": case.number}
    if case.way == "request":
        body |= case.sent
        wish: dict[str, Any] = {"source": "desk", "secrets": secrets}
        engine.says[case.number] = json.dumps(response_events.response([])).encode()
    else:
        wish = {"audience": case.audience, "secrets": secrets}
        is_chat = case.endpoint == "chat"
        body |= {"messages": [{"role": "user", "content": "x"}]} if is_chat else {"input": "x"}
        body |= {"stream": True} if case.way == "stream" else {}
        engine.says[case.number] = _said(case)
    plain = check(case.endpoint, body, consuming=False, publishing=False)
    told = {"lcguard": {"text": wish}}
    answer = front.http.post(PATHS[case.endpoint], json=body | told, headers=front.auth("clerk"))
    assert answer.status_code == 200, (str(case), answer.text)
    if case.way == "request":
        got = engine.read[case.number]
        return case, plain, {name: got[name] for name in plain}
    events = [named_data_of(raw) for raw in Events().feed(answer.content)]
    if case.endpoint == "responses":
        items = answer.json()["output"] if not events else response_events.read(events)
        return case, case.sent, items
    message = read([e for e in events if e]) if events else answer.json()["choices"][0]["message"]
    return case, _message(case.sent), _message(message)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """What a chat's message says."""
    calls = [c["function"] for c in message.get("tool_calls") or ()]
    texts = {k: message.get(k) or "" for k in ("content", "reasoning", "refusal")}
    return texts | {"calls": calls}


def _said(case: Case) -> bytes:
    """The engine's answer: of a stream every character is an event of its own, or few are cut."""
    number, stream = case.number, case.way == "stream"
    letters = not number % 4
    if case.endpoint == "responses":
        cut = response_events.every_character if letters else response_events.cut_at(3, 9, 17)
        if not stream:
            return json.dumps(response_events.response(case.sent, instructions=case.value)).encode()
        told = response_events.events(case.sent, cut, instructions=case.value)
        return b"".join(map(named_event, told))
    if not stream:
        choice = {
            "index": 0,
            "message": {"role": "assistant", **case.sent},
            "finish_reason": "stop",
        }
        return json.dumps({"id": "x", "choices": [choice]}).encode()
    size = len(json.dumps(case.sent))
    told = chunks(case.sent, [*range(size)] if letters else [3, 9, 17])
    return b"".join([*map(event, told), DONE])


def test_they_are_in_every_place_and_its_reader_would_see_them(
    outcomes: list[tuple[Case, Any, Any]],
) -> None:
    assert len(outcomes) == N
    assert {(c.way, c.endpoint, c.place) for c, _, _ in outcomes} == {w[:3] for w in WHERE}
    assert [str(c) for c, plain, _ in outcomes if not leaks(plain, c.value)] == []


def test_none_reaches_who_must_not_read_it(outcomes: list[tuple[Case, Any, Any]]) -> None:
    assert [str(c) for c, _, got in outcomes if leaks(got, c.value)] == []


def test_nothing_else_is_lost(outcomes: list[tuple[Case, Any, Any]]) -> None:
    """With what was written back in the placeholder's place it says what was sent."""
    other = []
    for case, plain, got in outcomes:
        if _flat(got, case.written) != _flat(plain, ""):
            other.append(f"{case}\n{plain}\n{got}")
    assert "\n".join(other[:3]) == ""


def test_every_argument_is_the_json_that_it_was(outcomes: list[tuple[Case, Any, Any]]) -> None:
    n = 0
    for case, plain, got in outcomes:
        before, after = list(_arguments(plain)), list(_arguments(got))
        assert len(before) == len(after), str(case)
        for one in after:
            json.loads(one)
            n += 1
    assert n > N / 4


def test_no_stream_says_anywhere_what_it_hides(front: Front, engine: Scripted) -> None:
    """The raw bytes of streams, in which the request's own fields come back too."""
    streams = [c for c in cases() if c.way == "stream" and c.endpoint == "responses"][:20]
    for case in streams:
        wish = {"audience": case.audience, "secrets": [case.value] if case.named else []}
        body = {"model": "nano", "seed": case.number, "input": "x", "stream": True}
        answer = front.http.post(
            PATHS["responses"],
            json=body | {"lcguard": {"text": wish}},
            headers=front.auth("clerk"),
        )
        events = [named_data_of(raw) for raw in Events().feed(answer.content)]
        assert [e for e in events if leaks(e, case.value)] == [], str(case)
        hidden = events[-1]["response"]["lcguard"]["text"]["hidden"]
        assert sum(hidden.values()) >= 1, str(case)


def test_the_audit_has_each_of_them_and_no_value(
    outcomes: list[tuple[Case, Any, Any]], front: Front
) -> None:
    data = b"".join(p.read_bytes() for p in Path(front.site.folder).glob("lcguard.sqlite*"))
    assert data.count(b"text_guarded") >= N
    assert [str(c) for c, _, _ in outcomes if c.named and c.written.encode() in data] == []


def _flat(value: Any, written: str) -> Any:
    """What a value says: JSON in strings read, the parts of a text as one."""
    if isinstance(value, dict):
        return {_flat(k, written): _flat(v, written) for k, v in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(p, dict) and "text" in p for p in value):
            return _flat("".join(p["text"] for p in value), written)
        return [_flat(v, written) for v in value]
    if not isinstance(value, str):
        return value
    if value[:1] in ("{", "["):
        try:
            return _flat(json.loads(value), written)
        except ValueError:
            pass
    return PLACEHOLDER.sub(lambda _: written, value)


def _arguments(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "arguments":
                yield item
            yield from _arguments(item)
    elif isinstance(value, list):
        for item in value:
            yield from _arguments(item)
