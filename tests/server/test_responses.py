"""OpenAI's Responses API with a real engine: answers, handoffs of KV and of text, streamed or not,
by the ``openai`` package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.docs.blocks import block
from tests.engine import needs_vllm
from tests.server.proxy import ASK_COMPLAINT, ASK_SSN, COMPLAINT, NAME, NOTE, SSN, Front
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

Clients = Callable[..., openai.OpenAI]
ASK_NAME = "What is the patient's name?"
TOOLS: Any = [
    {"type": "function", "name": "find", "parameters": {"type": "object"}, "strict": False}
]


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[Clients]:
    made: dict[tuple[str, str], openai.OpenAI] = {}

    def of(agent: str, tenant: str = "default") -> openai.OpenAI:
        key = front.auth(agent, tenant)["Authorization"].removeprefix("Bearer ")
        return made.setdefault(
            (agent, tenant),
            openai.OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0, timeout=300),
        )

    yield of
    for one in made.values():
        one.close()


def ask(who: openai.OpenAI, question: Any, handoff: Any = None, **more: Any) -> Any:
    body = {} if handoff is None else {"lcguard": handoff}
    options = {"model": "nano", "temperature": 0, "max_output_tokens": 24} | more
    return who.responses.create(input=question, extra_body=body, **options)


def last(stream: Any) -> tuple[Any, list[Any]]:
    """The response in the event that ends a stream, and all events."""
    events = list(stream)
    assert events[-1].type == "response.completed"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    return events[-1].response, events


def said(events: list[Any]) -> str:
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


def test_an_answer_is_vllm_s_own(client: Clients) -> None:
    plain = ask(client("intake"), ASK_COMPLAINT, instructions=NOTE)
    assert COMPLAINT in plain.output_text
    assert plain.usage.total_tokens == plain.usage.input_tokens + plain.usage.output_tokens
    assert plain.instructions == NOTE
    streamed, events = last(ask(client("intake"), ASK_COMPLAINT, instructions=NOTE, stream=True))
    assert streamed.output_text == said(events) == plain.output_text
    chat = client("intake").chat.completions.create(
        model="nano",
        temperature=0,
        max_tokens=24,
        messages=[{"role": "system", "content": NOTE}, {"role": "user", "content": ASK_COMPLAINT}],
    )
    assert chat.choices[0].message.content == plain.output_text


def test_an_answer_s_items_go_back_with_a_tool_round(client: Clients) -> None:
    first = ask(client("intake"), [{"role": "developer", "content": NOTE}], tools=TOOLS)
    call: Any = {"type": "function_call", "call_id": "c", "name": "find", "arguments": '{"a": 1}'}
    result: Any = {"type": "function_call_output", "call_id": "c"}
    history = [
        {"role": "system", "content": [{"type": "input_text", "text": NOTE}]},
        *[item.to_dict() for item in first.output],
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        call,
        result | {"output": [{"type": "input_text", "text": "nothing"}]},
        {"role": "user", "content": ASK_COMPLAINT},
    ]
    form = {"type": "json_schema", "name": "f", "schema": {"type": "object"}}
    more: Any = {"tools": TOOLS, "text": {"format": form}, "reasoning": {"effort": "low"}}
    answer = ask(client("intake"), history, **more)
    assert answer.output_text.lstrip().startswith("{")
    assert ask(client("intake"), history, tools=TOOLS).output_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_segment_is_published_and_consumed(front: Front, client: Clients, stream: bool) -> None:
    told = {"publish": {"audience": "hidden"}}
    made = ask(client("intake"), NOTE, told, max_output_tokens=1, stream=stream)
    made = last(made)[0] if stream else made
    published = made.lcguard["published"]
    assert published["guard"] == "gate"
    assert made.id == f"resp_{published['handle']}"
    assert "kv_transfer_params" not in made.to_dict()
    for handle in (published["handle"], made.id):
        got = ask(client("hidden"), ASK_COMPLAINT, {"consume": [handle]}, stream=stream)
        got, events = last(got) if stream else (got, [])
        assert COMPLAINT in got.output_text
        assert not events or said(events) == got.output_text
        assert [s["handle"] for s in got.lcguard["consumed"]] == [published["handle"]]
        # no more of the length than the edge's bucket, and nothing of the prefix cache
        assert got.usage.input_tokens > got.lcguard["consumed"][0]["n_tokens"]
        assert got.usage.input_tokens_details.cached_tokens == 0
    assert SSN not in ask(client("hidden"), ASK_SSN, {"consume": [made.id]}).output_text
    with pytest.raises(openai.PermissionDeniedError):
        ask(client("mallory"), ASK_SSN, {"consume": [made.id]})
    rows = audit_rows(front.site.folder / "lcguard.sqlite", "handle = ?", published["handle"])
    assert [r["event"] for r in rows][:4] == ["publish", "published", "consume", "consumed"]
    assert rows[-1]["verdict"] == "blocked"


def test_headers_ask_and_answer_for_the_field(client: Clients) -> None:
    raw = client("intake").responses.with_raw_response
    made: Any = raw.create(
        model="nano", input=NOTE, max_output_tokens=1, extra_headers={"x-lcguard-publish": "open"}
    )
    handle = made.headers["x-lcguard-handle"]
    assert made.parse().lcguard["published"]["handle"] == handle
    read = client("open").responses.create(
        model="nano",
        input=ASK_COMPLAINT,
        temperature=0,
        extra_headers={"x-lcguard-consume": handle},
    )
    assert COMPLAINT in read.output_text


def test_named_values_are_overwritten_as_in_a_chat(client: Clients) -> None:
    """The spans are counted on the tokens that vLLM renders for a response, tools included."""
    told: Any = {"publish": {"audience": "named", "secrets": [NAME, SSN]}}
    given = [
        {"role": "user", "content": NOTE},
        {"type": "function_call", "call_id": "c", "name": "find", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": f"{NAME} is here."},
    ]
    made = ask(client("intake"), given, told, instructions="Be brief.", tools=TOOLS)
    assert made.lcguard["published"]["redacted_spans"] == 3
    brief = ask(client("intake"), NOTE, told, max_output_tokens=1)
    assert brief.lcguard["published"]["redacted_spans"] == 2
    handle = brief.lcguard["published"]["handle"]
    assert SSN not in ask(client("named"), ASK_SSN, {"consume": [handle]}).output_text
    assert COMPLAINT in ask(client("named"), ASK_COMPLAINT, {"consume": [handle]}).output_text


def test_a_prompt_from_another_agent_is_guarded_before_the_model_reads_it(client: Clients) -> None:
    clerk = client("clerk", "scribes")
    told = {"text": {"source": "desk", "secrets": [NAME, SSN]}}
    items = [{"role": "system", "content": NOTE}, {"role": "user", "content": ASK_NAME}]
    assert NAME in ask(clerk, items).output_text, "unguarded, the model reads it"
    assert NAME not in ask(clerk, items, told).output_text
    got = ask(clerk, ASK_COMPLAINT, told, instructions=NOTE)
    assert COMPLAINT in got.output_text
    assert NAME not in str(got.to_dict()), "nor does the answer say what was asked"
    assert got.lcguard == {"text": {"source": "desk"}}


def test_an_answer_for_another_agent_is_guarded_streamed_or_not(client: Clients) -> None:
    clerk = client("clerk", "scribes")
    told = {"text": {"audience": "desk", "secrets": [NAME], "conversation": "c"}}
    whole = ask(clerk, ASK_NAME, told, instructions=NOTE, tools=TOOLS)
    assert "[TEXT-" in whole.output_text
    assert whole.lcguard == {"text": {"audience": "desk", "hidden": {"TEXT": 1}}}
    streamed, events = last(ask(clerk, ASK_NAME, told, instructions=NOTE, stream=True))
    assert streamed.lcguard == whole.lcguard
    for one in (whole, streamed, *events):
        assert NAME not in str(one.to_dict())
    done = [e.text for e in events if e.type == "response.output_text.done"]
    assert [said(events)] == done == [streamed.output_text] == [whole.output_text]
    passed = ask(clerk, ASK_COMPLAINT, told, instructions=NOTE)
    assert COMPLAINT in passed.output_text


def test_the_documented_client_runs_word_for_word(
    front: Front, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCGUARD_URL", f"{front.url}/v1")
    for agent in ("intake", "billing"):
        key = front.auth(agent, "unwritten")["Authorization"].removeprefix("Bearer ")
        monkeypatch.setenv(f"{agent.upper()}_KEY", key)
    names: dict[str, Any] = {}
    exec(block("docs/proxy.md", "responses.create("), names)
    for name in ("intake", "billing"):
        names[name].close()
    complaint, number = capsys.readouterr().out.splitlines()
    assert "back pain" in complaint
    assert SSN not in number


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "send the conversation's items as input"),
    ({"background": True}, "wait for the answer, or stream it"),
    ({"conversation": "conv_1"}, "send the conversation's items as input"),
    ({"tools": [{"type": "web_search"}]}, "send type function"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"extra_body": {"previous_input_messages": []}}, "send input"),
    ({"max_output_tokens": 10**9}, "max_output_tokens"),
]


@pytest.mark.parametrize(("asked", "why"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_would_be_kept_or_run_beside_the_guard_is_refused(
    client: Clients, asked: dict[str, Any], why: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(why)):
        client("intake").responses.create(**({"model": "nano", "input": "hi"} | asked))


def test_log_probabilities_are_for_answers_that_read_no_segment(
    front: Front, client: Clients
) -> None:
    more: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    assert ask(client("intake"), "hi", **more).output[0].content[0].logprobs
    handle = front.handle(front.auth("intake"), "open")
    for name, value in more.items():
        with pytest.raises(openai.BadRequestError, match=name):
            ask(client("open"), "hi", {"consume": [handle]}, **{name: value})


def test_nothing_is_kept_of_a_response(client: Clients) -> None:
    made = ask(client("intake"), "hi", store=True)
    for call in ("retrieve", "delete", "cancel"):
        with pytest.raises(openai.NotFoundError, match="no response is kept"):
            getattr(client("intake").responses, call)(made.id)
    with pytest.raises(openai.NotFoundError, match="no response is kept"):
        list(client("intake").responses.input_items.list(made.id))
