"""The guard contract: complete for the installed vLLM, closed to everything else."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params

from lcguard.server.gateway.contract import ContractError, check, clean, describe, markdown, page
from lcguard.server.gateway.contract_fields import (
    ANSWER,
    ANSWER_MEANING,
    CHOICE,
    FIELDS,
    MEANING,
    MESSAGE,
    RENDERER_OPTIONS,
    USAGE,
    Endpoint,
    Field,
)
from tests.engine import needs_vllm
from tests.paths import ROOT

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completions": {"prompt": "hello"},
}
EVERY = [(e, name, field) for e in ENDPOINTS for name, field in FIELDS[e].items()]
SAMPLE: dict[type, Any] = {
    bool: True,
    int: 3,
    float: 0.5,
    str: "text",
    list: [{"role": "user"}],
    dict: {"a": 1},
}


def asks(endpoint: Endpoint, name: str, field: Field) -> Any:
    """A value of the right type that asks for something."""
    if name in MINIMAL[endpoint]:
        return MINIMAL[endpoint][name]
    return SAMPLE[min(field.types, key=lambda t: t.__name__)]


def refusal(
    body: Any, endpoint: Endpoint = "chat", consuming: bool = False, publishing: bool = False
) -> ContractError:
    with pytest.raises(ContractError) as refused:
        check(endpoint, body, consuming, publishing)
    assert refused.value.status == 400
    assert "\n" not in refused.value.message
    return refused.value


# ---- complete for vLLM, and for OpenAI's clients

OF_OPENAI: dict[Endpoint, set[str]] = {
    "chat": {*chat_params.CompletionCreateParamsBase.__annotations__},
    "completions": {*text_params.CompletionCreateParamsBase.__annotations__},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_parameter_of_openai_s_client_is_judged(endpoint: Endpoint) -> None:
    assert OF_OPENAI[endpoint] <= {*FIELDS[endpoint]}
    assert {*ChatCompletionMessage.model_fields} <= {*MESSAGE}


@pytest.mark.parametrize("handoff", [True, False])
def test_what_openai_s_clients_send_unasked_is_no_error(handoff: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}]}
    more = {
        "store": True,
        "metadata": {"run": "7"},
        "verbosity": "low",
        "service_tier": "auto",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "modalities": ["text"],
    }
    assert check("chat", asked | more, handoff, handoff) == asked
    for name, value in {"modalities": ["audio"], "functions": [], "prediction": {}}.items():
        assert refusal(asked | {name: value}).param == name


def test_an_answer_s_message_may_be_sent_back() -> None:
    told = {"role": "assistant", "content": "x"}
    back = told | {"annotations": [], "lcguard": {"published": {"handle": "h"}}}
    assert check("chat", {"messages": [back]}, False, True) == {"messages": [told]}


@needs_vllm
@pytest.mark.vllm
def test_every_field_of_vllm_s_requests_is_judged() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    models: dict[Endpoint, Any] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    for endpoint, model in models.items():
        own = OF_OPENAI[endpoint] - {"messages", "prompt"} - {*model.model_fields}
        assert set(FIELDS[endpoint]) == {*model.model_fields, "lcguard"} | own
        for name, found in model.model_fields.items():
            # an alias would be a second name for a field, and one that is not in the table
            assert (found.alias, found.validation_alias) == (None, None), name
            neutral = FIELDS[endpoint][name].neutral
            if neutral is not None:
                assert (
                    found.default == neutral
                    or (found.default, neutral) == (None, False)
                    or (name == "suffix")
                )


@needs_vllm
@pytest.mark.vllm
def test_every_field_of_vllm_s_answers_is_judged() -> None:
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as text

    whole = (
        chat.ChatCompletionResponse,
        chat.ChatCompletionStreamResponse,
        text.CompletionResponse,
        text.CompletionStreamResponse,
    )
    choices = (
        chat.ChatCompletionResponseChoice,
        chat.ChatCompletionResponseStreamChoice,
        text.CompletionResponseChoice,
        text.CompletionResponseStreamChoice,
    )
    assert set(ANSWER) == {name for m in whole for name in m.model_fields} | {"lcguard", "error"}
    assert set(CHOICE) == {name for m in choices for name in m.model_fields}
    assert set(USAGE) == set(text.UsageInfo.model_fields)


@needs_vllm
@pytest.mark.vllm
def test_beam_search_still_leaves_a_handoff_behind() -> None:
    """The reason for which it is refused: it takes no ``extra_args``, where handoffs travel."""
    from vllm.sampling_params import BeamSearchParams

    assert "extra_args" not in BeamSearchParams.__struct_fields__
    assert FIELDS["chat"]["use_beam_search"].kind == "refused_on_handoff"


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_passes_is_a_request_to_vllm(endpoint: Endpoint) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    model: Any = ChatCompletionRequest if endpoint == "chat" else CompletionRequest
    body = {
        **MINIMAL[endpoint],
        "model": "m",
        "temperature": 0,
        "max_tokens": 5,
        "n": 1,
        "seed": 3,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"5": 1},
        "structured_outputs": {"choice": ["a", "b"]},
        "user": "u",
    }
    passed = check(endpoint, body, consuming=True, publishing=True)
    request = model.model_validate(json.loads(json.dumps(passed)))
    for name in ("temperature", "stop", "seed", "stream", "logit_bias"):
        assert getattr(request, name) == body[name]


def test_no_template_option_is_an_option_of_the_renderer() -> None:
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
    assert named <= RENDERER_OPTIONS
    for name in RENDERER_OPTIONS:
        body = {**MINIMAL["chat"], "chat_template_kwargs": {name: "x"}}
        assert refusal(body).param == f"chat_template_kwargs.{name}"


# ---- each class does what it says


@pytest.mark.parametrize("consuming", [False, True])
@pytest.mark.parametrize("publishing", [False, True])
@pytest.mark.parametrize(
    ("endpoint", "name", "field"), EVERY, ids=[f"{e}-{n}" for e, n, _ in EVERY]
)
def test_each_field(
    endpoint: Endpoint, name: str, field: Field, consuming: bool, publishing: bool
) -> None:
    value = asks(endpoint, name, field)
    body = {**MINIMAL[endpoint], name: value}
    before = json.dumps(body)
    refused = {
        "refused": True,
        "refused_on_consume": consuming,
        "refused_on_publish": publishing,
        "refused_on_handoff": consuming or publishing,
    }.get(field.kind, False)
    if refused:
        error = refusal(body, endpoint, consuming, publishing)
        assert error.param == name
        assert field.fix
        assert field.fix in error.message
        for harmless in (None, field.neutral):
            allowed = check(endpoint, {**body, name: harmless}, consuming, publishing)
            assert name not in allowed
    else:
        passed = check(endpoint, body, consuming, publishing)
        assert passed == (MINIMAL[endpoint] if field.kind == "dropped" else body)
        assert passed is not body
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    ("endpoint", "name", "field"), EVERY, ids=[f"{e}-{n}" for e, n, _ in EVERY]
)
def test_a_value_of_another_type_never_passes(endpoint: Endpoint, name: str, field: Field) -> None:
    """``"true"`` and ``"2"`` are a boolean and a number to vLLM, and something else to a proxy."""
    if field.kind == "dropped":
        return
    for type_, value in SAMPLE.items():
        if type_ not in field.types:
            error = refusal({**MINIMAL[endpoint], name: value}, endpoint)
            assert str(error.param).startswith(name)


@pytest.mark.parametrize(
    ("endpoint", "name", "value"),
    [
        ("completions", "logprobs", False),  # vLLM reads 0: the sampled token's
        ("completions", "logprobs", 0),
        ("completions", "prompt_logprobs", 0),
        ("chat", "prompt_logprobs", 0),
        ("chat", "logprobs", 0),
        ("chat", "top_logprobs", False),
        ("chat", "top_logprobs", -1),
        ("chat", "echo", "false"),
        ("chat", "logprob_token_ids", []),
    ],
)
def test_almost_nothing_is_not_nothing(endpoint: Endpoint, name: str, value: Any) -> None:
    assert refusal({**MINIMAL[endpoint], name: value}, endpoint, consuming=True).param == name


@pytest.mark.parametrize("value", [0, 5, -1])
def test_a_publish_does_not_score_its_prompt(value: int) -> None:
    """What of the prompt stands in the prefix cache is not computed: there is nothing to say."""
    for endpoint in ("chat", "completions"):
        body = {**MINIMAL[endpoint], "prompt_logprobs": value}
        assert refusal(body, endpoint, publishing=True).param == "prompt_logprobs"
        assert check(endpoint, body, consuming=False, publishing=False)
        assert refusal({**MINIMAL[endpoint], "echo": True}, endpoint, publishing=True)


def test_one_sample_is_published() -> None:
    body = {**MINIMAL["chat"], "n": 1}
    assert "n" not in check("chat", body, consuming=False, publishing=True)
    assert refusal({**body, "n": 2}, publishing=True).param == "n"
    assert refusal({**body, "n": True}, publishing=True).param == "n"
    assert check("chat", {**body, "n": 2}, consuming=True, publishing=False)["n"] == 2


def test_numbers_are_finite() -> None:
    body = json.loads('{"prompt": "x", "temperature": 1e999}')
    assert refusal(body, "completions").param == "temperature"


# ---- unknown fields


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("promt_logprobs", "did you mean 'prompt_logprobs'?"),
        ("guided_json", "leave it out"),
        ("Messages", "did you mean 'messages'?"),
        ("", "leave it out"),
        ("x" * 10**6, "leave it out"),
    ],
    ids=["typo", "typo of a refused one", "removed", "case", "empty", "long"],
)
def test_unknown_fields_are_refused_with_the_nearest(name: str, hint: str) -> None:
    error = refusal({**MINIMAL["chat"], name: None})
    assert hint in error.message
    assert len(error.message) < 300


def test_fields_of_the_other_endpoint_are_unknown() -> None:
    assert refusal({**MINIMAL["completions"], "top_logprobs": 0}, "completions")
    assert refusal({**MINIMAL["chat"], "prompt": "x"})


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


# ---- answers


def test_an_answer_loses_what_the_client_must_not_have() -> None:
    choice = {name: name for name in CHOICE} | {"unheard_of": 1}
    answer = {name: name for name in ANSWER} | {"choices": [choice, choice], "unheard_of": 1}
    before = json.dumps(answer)
    plain, consumed = clean(answer, consuming=False), clean(answer, consuming=True)
    for table, kept, left in (
        (ANSWER, plain, consumed),
        (CHOICE, plain["choices"][0], consumed["choices"][1]),
    ):
        assert set(kept) == {n for n, c in table.items() if c in ("passed", "removed_on_consume")}
        assert set(left) == {n for n, c in table.items() if c == "passed"}
    assert not {"kv_transfer_params", "routed_experts"} & {*plain, *plain["choices"][0]}
    assert json.dumps(answer) == before
    usage = {
        "prompt_tokens": 70,
        "completion_tokens": 2,
        "total_tokens": 72,
        "prompt_tokens_details": {"cached_tokens": 61},
    }
    assert clean({"usage": usage}, consuming=False) == {"usage": usage}
    counted = {"prompt_tokens": 73, "completion_tokens": 2, "total_tokens": 75}
    assert clean({"usage": usage}, consuming=True, unsaid_tokens=3) == {"usage": counted}
    assert clean({"error": {"message": "x"}}, consuming=True) == {"error": {"message": "x"}}
    assert clean({"choices": [None, 5]}, consuming=True) == {"choices": []}


# ---- told to the outside


def test_description_and_tables_name_every_field() -> None:
    told = json.loads(json.dumps(describe()))
    text = markdown()
    for endpoint in ENDPOINTS:
        request = told["endpoints"][endpoint]["request"]
        assert {n: f["class"] for n, f in request.items()} == {
            n: f.kind for n, f in FIELDS[endpoint].items()
        }
        for name, field in FIELDS[endpoint].items():
            rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            assert any(field.why in row for row in rows)
    assert told["answer"]["fields"]["kv_transfer_params"] == "removed"
    assert set(told["classes"]) == set(MEANING) == {f.kind for _, _, f in EVERY}
    assert {*ANSWER.values(), *CHOICE.values()} == set(ANSWER_MEANING)


def test_every_refusal_has_a_fix() -> None:
    for _, name, field in EVERY:
        assert bool(field.fix) == field.kind.startswith("refused"), name
    assert get_args(Endpoint) == ENDPOINTS


def test_the_documents_page_is_the_table() -> None:
    shown = (ROOT / "docs" / "contract.md").read_text()
    assert shown == page(), "print it again, see its first lines"
