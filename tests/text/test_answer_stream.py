"""A stream's client reads what a whole answer's does, however the answer is cut into events."""

from __future__ import annotations

import json
import random
import time
from itertools import islice, pairwise
from typing import Any

import pytest

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.policy import parse_policy
from lcguard.server.gateway.sse import Events, data_of, event
from lcguard.text.guard import TextGuard
from lcguard.text.stream import AnswerStream, settled
from tests.text.planting import planted
from tests.text.policies import KEY, TERMS, guard, leaks

NAME = "Ada Long"


def terms_alone() -> TextGuard:
    """An edge that has no pattern, so that its streams go on."""
    edge = {"source": "a", "audience": "b", "channel": "text", "forbid": ["own"]}
    own = {"own": {"terms": [*TERMS]}}
    found = parse_policy({"version": 1, "categories": own, "edges": [edge]})
    return TextGuard(found, "a", "b", key=KEY)


def chunks(message: dict[str, Any], cuts: list[int], index: int = 0) -> list[dict[str, Any]]:
    """An answer's message as a stream of pieces: every text is cut at ``cuts``."""
    out: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name, value in message.items():
        if isinstance(value, str):
            out += [{name: part} for part in _parts(value, cuts)]
    for i, call in enumerate(message.get("tool_calls") or ()):
        head = {"id": call["id"], "type": "function", "index": i}
        out.append({"tool_calls": [{**head, "function": {"name": call["function"]["name"]}}]})
        out += [
            {"tool_calls": [{"index": i, "function": {"arguments": part}}]}
            for part in _parts(call["function"]["arguments"], cuts)
        ]
    made = [{"index": index, "delta": delta, "finish_reason": None} for delta in out]
    made.append({"index": index, "delta": {}, "finish_reason": "stop", "stop_reason": None})
    return [{"id": "x", "object": "chat.completion.chunk", "choices": [c]} for c in made]


def _parts(text: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted({c for c in cuts if 0 < c < len(text)}), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


def sent(stream: AnswerStream, pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [made for chunk in pieces if (made := stream.feed(chunk)) is not None]


def read(pieces: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message as OpenAI's clients put it together."""
    out: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in pieces:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            for name, value in choice["delta"].items():
                if isinstance(value, str):
                    out[name] = out.get(name, "") + value if name != "role" else value
            for call in choice["delta"].get("tool_calls", ()):
                have = calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                have["id"] += call.get("id") or ""
                for name in ("name", "arguments"):
                    have[name] += call["function"].get(name) or ""
    if calls:
        out["tool_calls"] = [
            {"id": c["id"], "function": {"name": c["name"], "arguments": c["arguments"]}}
            for _, c in sorted(calls.items())
        ]
    return out


def whole(edge: TextGuard, message: dict[str, Any], secrets: list[str]) -> dict[str, Any]:
    (made,) = edge.choices([{"message": message}], secrets).value
    out = {k: v for k, v in made["message"].items() if v not in (None, "")}
    if "tool_calls" in out:
        out["tool_calls"] = [
            {"id": c["id"], "function": dict(c["function"])} for c in out["tool_calls"]
        ]
    return out


ANSWERS = (
    {"content": f"It is {NAME}, not ADA\nLÓNG or Ada&nbsp;Lo&#110;g; <b>Ada</b> L\u200bong. Kite"},
    {"content": "A Blue\u00a0Heron, a ZOË UNIT 4711 and Zoe\u0308 Unit 4712, 50% and a < b & c"},
    {"reasoning": "They said Ada", "content": "Long was there, and Ada"},
    {"content": 'json? {"a": 1} and [x] and \\u0041da Long \\n Ada\\u0020Long', "refusal": "Grey"},
    {"content": '{"who": "Ada Long", "n": [12, 4711]}'},
    {"content": "Adaaaa Ada Lon Ada Lo Ada Long Ada Longer Lo"},
)


@pytest.mark.parametrize("message", ANSWERS, ids=str)
def test_a_text_cut_anywhere_is_read_as_the_whole(message: dict[str, Any]) -> None:
    edge = terms_alone()
    wanted = whole(edge, message, [NAME])
    longest = max(map(len, message.values()))
    for cuts in [*([i] for i in range(longest)), [*range(longest)], [*range(0, longest, 3)]]:
        stream = AnswerStream(edge, [NAME])
        got = read(sent(stream, chunks(message, cuts)))
        assert {k: v for k, v in got.items() if k != "role" and v} == wanted, cuts
    assert not leaks(wanted, NAME)


def test_events_cut_at_every_byte() -> None:
    edge, message = terms_alone(), {"content": f"Zoë: {NAME}, 東京 Zoë Unit 4711."}
    wanted = whole(edge, message, [NAME])
    raw = b"".join(event(c) for c in chunks(message, [7, 9, 14]))
    for at in range(len(raw)):
        events, stream = Events(), AnswerStream(edge, [NAME])
        out = [
            made
            for piece in (raw[:at], raw[at:])
            for one in events.feed(piece)
            if (made := stream.feed(data_of(one))) is not None
        ]
        assert read(out)["content"] == wanted["content"], at


def test_planted_values_are_in_no_event_of_any_stream() -> None:
    """Every cut, on an edge with a pattern and on one without."""
    draw, n = random.Random(3), 0
    for p in islice(planted(4), 160):
        message = p.messages[-2]
        if message.get("role") != "assistant" or "function_call" in message:
            continue
        own = p.value.startswith("PRJ")
        edge = guard() if own else terms_alone()
        secrets = [p.value] if p.named else []
        if "reasoning_content" in message or "content" in message:
            message = {k: v for k, v in message.items() if v not in (None, "")}
        size = len(json.dumps(message))
        for cuts in (list(range(size)), [draw.randrange(size) for _ in range(5)]):
            stream = AnswerStream(edge, secrets)
            out = sent(stream, chunks(message, cuts))
            got = {k: v for k, v in read(out).items() if k != "role" and v}
            wanted = {k: v for k, v in whole(edge, message, secrets).items() if k != "role"}
            assert got == wanted, (p.place, p.written, cuts)
            assert not leaks(got, p.value)
            assert sum(stream.hidden.values()) == 1
        n += 1
    assert n > 40


def test_running_text_is_sent_before_the_answer_ends() -> None:
    text = "The visit was short and nothing was found. " * 4
    stream = AnswerStream(terms_alone(), [NAME])
    out = sent(stream, chunks({"content": text}, list(range(len(text))))[:-1])
    assert len(out) > len(text) / 2
    held = len(text) - len(read(out)["content"])
    assert held < 24, "no more is held than the longest value has letters"


@pytest.mark.parametrize("edge", [guard(), guard(detect="none", forbid=["project", "person"])])
def test_a_pattern_may_look_at_any_distance(edge: TextGuard) -> None:
    stream = AnswerStream(edge, [])
    before = sent(stream, chunks({"content": "A long text of nothing. " * 9}, [40, 90])[:-1])
    assert read(before) == {"role": "assistant", "content": ""}


def test_every_choice_is_guarded() -> None:
    texts = [f"first {NAME} and on", f"second {NAME} and on"]
    streams = [chunks({"content": t}, list(range(40)), i) for i, t in enumerate(texts)]
    mixed = [c for pair in zip(*streams, strict=False) for c in pair]
    mixed += streams[1][len(streams[0]) :]
    stream = AnswerStream(terms_alone(), [NAME])
    out = sent(stream, mixed)
    got = [read(out, i)["content"] for i in (0, 1)]
    assert not leaks(got, NAME)
    assert [t.split()[0] for t in got] == ["first", "second"]
    assert stream.hidden == {"TEXT": 2}


def test_text_completions() -> None:
    stream = AnswerStream(terms_alone(), [NAME])
    pieces = [{"choices": [{"index": 0, "text": t}]} for t in ("It was Ad", "a Lo", "ng again, ")]
    last = {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"}]}
    out = sent(stream, [*pieces, last])
    text = "".join(c["choices"][0]["text"] for c in out)
    assert text == terms_alone().text("It was Ada Long again, yes", [NAME]).value


def test_a_field_that_goes_on_behind_another_ends_the_stream() -> None:
    text = "Long ago there were people of many kinds here."
    stream = AnswerStream(terms_alone(), [NAME])
    for delta in ({"reasoning": "Well"}, {"content": text}, {"reasoning": ", Ada"}):
        stream.feed({"choices": [{"index": 0, "delta": delta}]})
    with pytest.raises(HandoffError, match="without stream"):
        stream.feed({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


def test_a_search_is_bounded_and_a_long_stream_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = AnswerStream(terms_alone(), [NAME])
    pieces = chunks({"content": f"It was {NAME}, then."}, [3, 9])
    now = time.monotonic()
    monkeypatch.setattr("lcguard.text.search.time.monotonic", lambda: now + 1e6)
    assert not leaks(read(sent(stream, pieces)), NAME)
    monkeypatch.setattr("lcguard.text.search.SEARCH_S", -1.0)
    with pytest.raises(HandoffError, match="took longer"):
        terms_alone().text("x", [NAME])


def test_what_is_sure() -> None:
    assert settled("abcdefghij", 5, 10) == 1
    assert settled("Hello, w\\u00", 5, 5) == 2
    assert settled("", 5, 10) == 0
    assert settled("\\" * 500 + "abcdefghij", 5, 5) > 500, "in time that does not explode"
