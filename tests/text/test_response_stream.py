"""A response's stream reads as the whole response does, however it is cut into events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lcguard.handoff.errors import HandoffError
from lcguard.text.guard import TextGuard
from lcguard.text.response_stream import ResponseStream
from tests.engine import needs_vllm
from tests.text.policies import guard, leaks
from tests.text.response_events import (
    call,
    custom,
    cut_at,
    events,
    every_character,
    message,
    read,
    reasoning,
)
from tests.text.test_answer_stream import terms_alone

NAME = "Ada Long"
ANSWERS: list[list[dict[str, Any]]] = [
    [message(f"It is {NAME}, not ADA\nLÓNG or Ada&nbsp;Lo&#110;g; <b>Ada</b> L\u200bong. Kite")],
    [reasoning(f"They mean {NAME}."), message("A Blue\u00a0Heron, 50% and a < b & c")],
    [reasoning("They said Ada"), message("Long was there, and Ada")],
    [message('json? {"a": 1} and [x] and \\u0041da Long \\n Ada\\u0020Long')],
    [message(json.dumps({"who": NAME, "n": [12, 4711]})), message("and Ada")],
    [message("Adaaaa Ada Lon Ada Lo Ada Long Ada Longer Lo")],
    [
        reasoning("Ada asks"),
        message("I look for Ada Long now: Ada"),
        call(json.dumps({"Long": [NAME, {"q": json.dumps({"x": NAME})}], "n": 2.5})),
        call("{}", name="Ada_Long"),
        custom(f"note {NAME}\nZoë Unit 4711"),
    ],
    [message("")],
    [],
]


def sent(stream: ResponseStream, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [made for event in told for made in stream.feed(json.loads(json.dumps(event)))]


@pytest.mark.parametrize("items", ANSWERS, ids=lambda i: str([x["type"] for x in i]))
@pytest.mark.parametrize("edge", [terms_alone(), guard()], ids=["as it comes", "at the end"])
def test_an_answer_cut_anywhere_is_read_as_the_whole(
    items: list[dict[str, Any]], edge: TextGuard
) -> None:
    whole = edge.output(items, [NAME])
    texts = [i.get("arguments") or i.get("input") or str(i.get("content")) for i in items]
    waits = any(category.patterns for category in edge.edge.custom.values())
    longest = 3 if waits else max(map(len, texts), default=1)
    for cut in (every_character, *(cut_at(i) for i in range(0, longest, 1 + longest // 80))):
        stream = ResponseStream(edge, [NAME])
        got = sent(stream, events(items, cut))
        assert read(got) == whole.value
        assert not leaks(got, NAME)
        assert stream.hidden == whole.hidden
        assert stream.originals == whole.originals
    for item in whole.value:
        if item["type"] == "function_call":
            json.loads(item["arguments"])


def test_a_value_over_two_items_is_found_in_both_forms() -> None:
    whole = terms_alone().output(ANSWERS[2], [NAME])
    assert whole.hidden == {"TEXT": 1}
    assert whole.value[1]["content"][0]["text"] == " was there, and Ada"


def test_running_text_is_sent_before_the_answer_ends() -> None:
    thought, text = "The visit was short. " * 4, "Nothing was found there. " * 4
    stream = ResponseStream(terms_alone(), [NAME])
    told = events([reasoning(thought), message(text)], every_character)
    out = sent(stream, told[:-4])  # all but the end of the second item
    said = {k: "" for k in ("response.reasoning_text.delta", "response.output_text.delta")}
    for e in out:
        if e["type"] in said:
            said[e["type"]] += e["delta"]
    first, second = said.values()
    assert first == thought
    assert any(e["type"] == "response.output_item.done" for e in out)
    assert 0 < len(text) - len(second) < 24, "no more is held than the longest value has letters"


def test_a_pattern_may_look_at_any_distance() -> None:
    stream = ResponseStream(guard(), [])
    out = sent(stream, events([message("A long text of nothing. " * 9)], every_character)[:-1])
    assert [e["type"] for e in out] == ["response.created", "response.in_progress"]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.image_generation_call.partial_image", "output_index": 0},
        {"type": "response.output_text.delta", "output_index": 3, "content_index": 0, "delta": "x"},
        {
            "type": "response.content_part.added",
            "output_index": 0,
            "content_index": 0,
            "part": {"type": "input_image"},
        },
        {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": "y"},
        {"type": "response.in_progress", "response": {"output": [message(NAME)]}},
        {"output_index": 0},
    ],
    ids=str,
)
def test_what_is_not_known_ends_the_stream(event: dict[str, Any]) -> None:
    stream = ResponseStream(terms_alone(), [NAME])
    sent(stream, events([message("x")], every_character)[:5])
    with pytest.raises(HandoffError, match="cannot be guarded"):
        stream.feed(event)


def test_an_end_that_says_another_text_sends_nothing_further() -> None:
    stream = ResponseStream(terms_alone(), [NAME])
    sent(stream, events([message("Nothing of that kind was said by anybody.")], cut_at(20))[:-1])
    with pytest.raises(HandoffError, match="without stream"):
        sent(stream, events([message("Something else")], cut_at())[-1:])


@needs_vllm
@pytest.mark.vllm
def test_these_are_vllm_s_own_events() -> None:
    from vllm.entrypoints.generate.base.protocol import (
        DeltaFunctionCall,
        DeltaMessage,
        DeltaToolCall,
    )
    from vllm.entrypoints.openai.responses.streaming_events import SimpleStreamingEventProcessor

    items = [reasoning("Hm, Ada"), message("It is so."), call('{"who": "Ada"}')]
    deltas = [DeltaMessage(reasoning=r) for r in "Hm, Ada"]
    deltas += [DeltaMessage(content=c) for c in "It is so."]
    for i, piece in enumerate(['{"who"', ': "Ada"}']):
        head = {"id": "call_1", "type": "function"} if not i else {}
        function = DeltaFunctionCall(name=None if i else "find", arguments=piece)
        deltas.append(DeltaMessage(tool_calls=[DeltaToolCall(index=0, function=function, **head)]))
    processor, made = SimpleStreamingEventProcessor(), list[Any]()
    for delta in deltas:
        state, tool = processor.resolve_target_state(delta)
        if processor.needs_transition(state, tool):
            made += [*processor.close_current(), *processor.open(state, tool)]
        made += processor.emit_delta(delta, None)  # type: ignore[arg-type]
    made += processor.close_current()
    theirs = [e.model_dump(mode="json", by_alias=True) for e in made]
    cuts = {"Hm, Ada": list, "It is so.": list}
    ours = events(items, lambda t: cuts.get(t, lambda x: [x[:6], x[6:]])(t))[2:-1]
    assert [_form(e) for e in ours] == [_form(e) for e in theirs]
    stream = ResponseStream(terms_alone(), ["Ada"])
    begun = events([], cut_at())[:2]
    output = [item.model_dump(mode="json", by_alias=True) for item in processor.output_items]
    last = events(output, cut_at())[-1]
    # vLLM draws its items' ids, and hexadecimal ones may hold "ada"
    assert not leaks(_form(read(sent(stream, [*begun, *theirs, last]))), "Ada")


def _form(event: dict[str, Any]) -> Any:
    """What an event says, without what is drawn, and fields that say nothing."""
    drawn = ("id", "item_id", "call_id", "sequence_number")
    if isinstance(event, dict):
        return {k: _form(v) for k, v in event.items() if k not in drawn and v not in (None, [])}
    return [_form(e) for e in event] if isinstance(event, list) else event
