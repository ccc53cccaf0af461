"""The guard contract on a response: one form for each item, and what of an answer is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lcguard.server.detection.response_chat import chat_of
from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_answer import clean_event, clean_response
from tests.engine import needs_vllm
from tests.server.gateway.contract_cases import refusal

TEXT = {"type": "output_text", "text": "a", "annotations": [], "logprobs": None}
CALL: dict[str, Any] = {
    "type": "function_call",
    "call_id": "c",
    "name": "f",
    "arguments": '{"q": 1}',
}
RESULT = {"type": "function_call_output", "call_id": "c", "output": [TEXT | {"type": "input_text"}]}
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "d"},
    {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text"}]},
    {"type": "message", "role": "assistant", "id": "msg_1", "content": [TEXT, TEXT]},
    CALL | {"namespace": "n", "id": "fc_1", "caller": None, "status": "completed"},
    RESULT | {"id": None, "status": "completed"},
    {"role": "assistant", "content": "so far", "status": "incomplete"},
]
HISTORY[2]["content"] = [{"type": "reasoning_text", "text": t} for t in ("r", "s")]


def forwarded(items: list[Any], **more: Any) -> dict[str, Any]:
    return check("responses", {"input": items, **more}, consuming=False, publishing=False)


def test_each_item_has_one_form() -> None:
    text = {"type": "output_text", "annotations": []}
    assert forwarded(HISTORY)["input"] == [
        {"type": "message", "role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "rs"}],
        },
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [text | {"text": "aa"}]},
        CALL | {"namespace": "n", "id": "fc_1", "status": "completed"},
        RESULT | {"output": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
            "content": [text | {"text": "so far"}],
        },
    ]


@needs_vllm
@pytest.mark.vllm
def test_the_chat_that_is_counted_is_the_one_that_vllm_makes() -> None:
    from vllm.entrypoints.openai.responses import utils
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    space = {"type": "namespace", "name": "n", "description": "x", "tools": [function]}
    for given in (HISTORY, HISTORY[:-1], HISTORY[3:], "hi"):
        body = check("responses", {"input": given, "instructions": "i"}, False, True)
        body |= {"tools": [function, space], "model": "m"}
        request = ResponsesRequest.model_validate(json.loads(json.dumps(body)))
        made = utils.construct_input_messages(
            request_instructions=request.instructions, request_input=request.input
        )
        chat = chat_of(body)
        assert _plain(chat["messages"]) == _plain(made)
        goes_on = utils.should_continue_final_message(request.input)
        assert (chat["continue_final_message"], chat["add_generation_prompt"]) == (
            goes_on,
            not goes_on,
        )
        tools = utils.construct_tool_dicts(request.tools, "auto")
        assert tools is not None
        names = [tool["function"]["name"] for tool in tools]
        assert names == [tool["function"]["name"] for tool in chat["tools"]] == ["f", "n__f"]


def _plain(messages: list[Any]) -> Any:
    """Without what vLLM leaves in a message, and no template is given."""
    text = json.dumps([{k: v for k, v in m.items() if k != "type"} for m in messages])
    return json.loads(text.replace('"input_text"', '"text"'))


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("x", ""),
        ({"id": "msg_1"}, ".type"),
        ({"type": "item_reference", "id": "msg_1"}, ".type"),
        ({"type": "web_search_call", "id": "x", "status": "completed"}, ".type"),
        ({"type": ["message"], "role": "user", "content": "x"}, ".type"),
        ({"role": "tool", "content": "x"}, ".role"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": "x", "contents": "y"}, ".contents"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "input_text", "text": 5}]}, ".content[0]"),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "x", "image_url": "y"}]},
            ".content[0]",
        ),
        ({"role": "user", "content": [TEXT]}, ".content[0]"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, ".arguments"),
        (CALL | {"arguments": {}}, ".arguments"),
        (CALL | {"async": True}, ".async"),
        ({"type": "function_call_output", "call_id": "c", "output": None}, ".output"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "x"}, ".encrypted_content"),
        ({"type": "reasoning", "summary": [{"type": "text", "text": "x"}]}, ".summary[0]"),
    ],
    ids=str,
)
def test_other_items_are_refused(item: Any, param: str) -> None:
    error = refusal({"input": [{"role": "user", "content": "x"}, item]}, "responses")
    assert error.param == f"input[1]{param}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "tools": [{"type": "mcp"}]}, "tools[0]"),
        ({"input": "x", "tools": ["f"]}, "tools[0]"),
        ({"input": "x", "tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        (
            {"input": "x", "tools": [{"type": "namespace", "tools": [{"type": "custom"}]}]},
            "tools[0].tools[0]",
        ),
        ({"input": "x", "include": ["file_search_call.results"]}, "include"),
        ({"input": "x", "include": [{}]}, "include"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "enable_response_messages": True}, "enable_response_messages"),
    ],
    ids=str,
)
def test_what_a_handoff_does_not_take(body: dict[str, Any], param: str) -> None:
    assert refusal(body, "responses", consuming=True, publishing=True).param == param


def test_what_openai_s_clients_send_unasked_is_no_error() -> None:
    asked = {"input": "x", "background": False, "truncation": "disabled", "top_logprobs": 0}
    more = {"store": True, "metadata": {"run": "7"}, "service_tier": "auto", "user": "u"}
    more |= {"prompt_cache_key": "a", "safety_identifier": "b", "stream_options": {}}
    assert check("responses", asked | more, True, True) == {"input": "x"}
    assert check("responses", {"input": [], "instructions": "x"}, True, True)


def test_an_answer_says_nothing_that_its_receiver_did_not_send() -> None:
    told: dict[str, Any] = {
        "id": "resp_1",
        "instructions": "secret",
        "tools": [{"type": "function", "name": "secret"}],
        "tool_choice": {"type": "function", "name": "secret"},
        "text": {"format": {"type": "text"}},
        "input_messages": ["secret"],
        "kv_transfer_params": {"secret": 1},
        "unheard_of": "secret",
        "output": [
            {
                "type": "message",
                "content": [{"type": "output_text", "text": "x", "logprobs": ["secret"]}],
                "unheard_of": "secret",
            }
        ],
        "usage": {
            "input_tokens": 70,
            "total_tokens": 72,
            "input_tokens_details": {"cached_tokens": 61},
        },
    }
    shown = clean_response(told, consuming=True, unsaid_tokens=3)
    assert "secret" not in json.dumps(shown)
    assert (shown["tools"], shown["tool_choice"], shown["instructions"]) == ([], "auto", None)
    assert shown["usage"] == {
        "input_tokens": 73,
        "total_tokens": 75,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    }
    own = clean_response(told, consuming=False)
    assert own["instructions"] == "secret"
    assert own["usage"]["input_tokens_details"] == {"cached_tokens": 61}
    assert "kv_transfer_params" not in own
    event = {"type": "response.completed", "response": told, "unheard_of": "secret"}
    assert clean_event(event, True, 3) == {"type": "response.completed", "response": shown}
    delta = {"type": "response.output_text.delta", "delta": "x", "logprobs": ["secret"]}
    assert clean_event(delta, True) == delta | {"logprobs": []}
    assert clean_event(delta, False) == delta
