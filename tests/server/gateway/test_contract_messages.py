"""The guard contract on prompts, messages and anything else that JSON can say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_error import ContractError
from lcguard.server.gateway.contract_fields import (
    FIELDS,
    Endpoint,
)
from tests.server.gateway.contract_cases import ENDPOINTS, MINIMAL, refusal

# ---- prompts and messages


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {}}]},
        {
            "role": "assistant",
            "content": "x",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": "y",
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ],
)
def test_text_messages_pass_as_they_are(message: dict[str, Any]) -> None:
    for handoff in (False, True):
        body = {"messages": [message]}
        assert check("chat", body, consuming=handoff, publishing=handoff) == body


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"image_url": "data:,"},
        {"type": "text", "text": "x", "image_url": "data:,"},
        {"type": "text", "text": "x", "uuid": "1"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "file", "file": {}},
        {"type": "input_text", "text": "x"},
        {"type": "text", "text": 5},
        {"type": "text"},
        {"text": "x"},
        {"type": ["text"], "text": "x"},
        "x",
        None,
        5,
        ["x"],
    ],
    ids=str,
)
def test_only_text_parts(part: Any) -> None:
    parts = [{"type": "text", "text": "x"}, part]
    error = refusal({"messages": [{"role": "user", "content": parts}]})
    assert error.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("x", "messages"),
        ([5], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 5}], "messages[0].role"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "contents": "x"}], "messages[0].contents"),
        ([{"role": "user", "audio": {"id": "x"}}], "messages[0].audio"),
        ([{"role": "user"}, {"role": "user", "image_url": "x"}], "messages[1].image_url"),
    ],
)
def test_malformed_messages(messages: Any, param: str) -> None:
    assert refusal({"messages": messages}).param == param


def test_refusals_show_nothing_of_the_prompt() -> None:
    for content in ({"secret4711": "secret4711"}, ["secret4711"], [{"type": "secret4711"}]):
        error = refusal({"messages": [{"role": "user", "content": content}]})
        assert "secret4711" not in error.message + str(error.param)


def test_one_prompt_for_a_handoff() -> None:
    for prompt in ("x", [1, 2, 3]):
        body = {"prompt": prompt}
        assert check("completions", body, consuming=True, publishing=True) == body
    for many in (["x"], ["x", "y"], [[1], [2]], [[1]]):
        body = {"prompt": many}
        assert check("completions", body, consuming=False, publishing=False) == body
        for consuming in (False, True):
            assert refusal(body, "completions", consuming, not consuming).param == "prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [True],
        [1.0],
        [1, "x"],
        [[1], "x"],
        [[]],
        [[True]],
        [[[1]]],
        [None],
        [{}],
        [[1, "x"]],
    ],
    ids=str,
)
def test_prompts_of_anything_else(prompt: Any) -> None:
    assert refusal({"prompt": prompt}, "completions").param == "prompt"


def test_template_options_are_plain_values() -> None:
    options = {"enable_thinking": False, "budget": 5, "style": "x", "t": 0.5, "none": None}
    body = {**MINIMAL["chat"], "chat_template_kwargs": options}
    assert check("chat", body, consuming=True, publishing=True) == body
    for value in ({}, [], {"chat_template": "x"}):
        body = {**MINIMAL["chat"], "chat_template_kwargs": {"a": value}}
        assert refusal(body).param == "chat_template_kwargs.a"


# ---- anything at all

_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.sampled_from(["text", "user", "false", "1"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["role", "content", "type", "text", "tool_calls", "a"]), st.text()
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


_NAMES = st.sampled_from(sorted({*FIELDS["chat"], *FIELDS["completions"]}))


@settings(max_examples=400, deadline=None)
@given(
    endpoint=st.sampled_from(ENDPOINTS),
    body=st.one_of(
        _JSON,
        st.dictionaries(_NAMES, _JSON, max_size=6),
        st.dictionaries(_NAMES, _JSON, max_size=3).map(lambda d: {**MINIMAL["chat"], **d}),
        st.dictionaries(_NAMES, _JSON, max_size=3).map(lambda d: {**MINIMAL["completions"], **d}),
    ),
    consuming=st.booleans(),
    publishing=st.booleans(),
)
def test_any_body_passes_or_is_refused(
    endpoint: Endpoint, body: Any, consuming: bool, publishing: bool
) -> None:
    refused, passed = None, dict[str, Any]()
    try:
        passed = check(endpoint, body, consuming, publishing)
    except ContractError as error:
        refused = error
    if refused is not None:
        # it goes to logs and clients as it is
        assert (refused.message + str(refused.param)).isascii()
        assert len(refused.message) < 400
    for name in passed:
        kind = FIELDS[endpoint][name].kind
        assert kind not in ("dropped", "refused")
        assert not (consuming and kind in ("refused_on_consume", "refused_on_handoff"))
        assert not (publishing and kind in ("refused_on_publish", "refused_on_handoff"))
        assert type(passed[name]) in FIELDS[endpoint][name].types
