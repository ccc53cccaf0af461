"""The guard contract: complete for the installed vLLM, closed to everything else."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_args

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from lcguard.server.gateway.contract import check, describe, markdown, page
from lcguard.server.gateway.contract_answer import clean
from lcguard.server.gateway.contract_fields import (
    ANSWER,
    ANSWER_MEANING,
    CHOICE,
    CONTENT,
    EVENTS,
    FIELDS,
    MEANING,
    MESSAGE,
    OUTPUT,
    RENDERER_OPTIONS,
    RESPONSE,
    RESPONSE_USAGE,
    USAGE,
    Endpoint,
    Field,
)
from tests.engine import needs_vllm
from tests.paths import ROOT
from tests.server.gateway.contract_cases import ENDPOINTS, MINIMAL, SAMPLE, asks, refusal
from tests.vllm.records import RECORDS, fields_of


def known(kind: str) -> set[str]:
    """Fields of any version that was recorded."""
    return {name for record in RECORDS for name in fields_of(record, kind)}


EVERY = [(e, name, field) for e in ENDPOINTS for name, field in FIELDS[e].items()]


# ---- complete for vLLM, and for OpenAI's clients

OF_OPENAI: dict[Endpoint, set[str]] = {
    "chat": {*chat_params.CompletionCreateParamsBase.__annotations__},
    "completions": {*text_params.CompletionCreateParamsBase.__annotations__},
    "responses": {*response_create_params.ResponseCreateParamsBase.__annotations__},
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
    told = {"prompt": "x"}
    assert check("completions", told | {"metadata": {"run": "7"}}, handoff, handoff) == told
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
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    models: dict[Endpoint, Any] = {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "responses": ResponsesRequest,
    }
    for endpoint, model in models.items():
        own = OF_OPENAI[endpoint] - {"messages", "prompt"} - {*model.model_fields}
        own |= {"metadata"}  # vLLM and the client know it of chats alone; clients send it with both
        other = {name for record in RECORDS for name in fields_of(record, endpoint)}
        assert set(FIELDS[endpoint]) == {*model.model_fields, "lcguard"} | own | other
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
    own = {"lcguard", "error"}
    assert set(ANSWER) == {name for m in whole for name in m.model_fields} | own | known("answer")
    assert set(CHOICE) == {name for m in choices for name in m.model_fields} | known("choice")
    assert set(USAGE) == set(text.UsageInfo.model_fields)


@needs_vllm
@pytest.mark.vllm
def test_every_field_of_vllm_s_responses_is_judged() -> None:
    from vllm.entrypoints.openai.responses import protocol, streaming_events

    items = (
        streaming_events.ResponseOutputMessage,
        streaming_events.ResponseReasoningItem,
        streaming_events.ResponseFunctionToolCall,
        streaming_events.ResponseCustomToolCall,
    )
    assert set(OUTPUT) == {f.alias or n for m in items for n, f in m.model_fields.items()}
    assert {*streaming_events.ResponseOutputText.model_fields} <= set(CONTENT)
    own = {"lcguard", "error"} | known("response")
    assert set(RESPONSE) == {*protocol.ResponsesResponse.model_fields} | own
    assert set(RESPONSE_USAGE) == {*protocol.ResponseUsage.model_fields}
    made = [getattr(streaming_events, n) for n in vars(streaming_events) if n.endswith("Event")]
    here = ("output_item", "content_part", "text", "reasoning_text", "function", "custom_tool")
    served = [m for m in made if str(m.model_fields["type"].annotation).count("response.")]
    served = [m for m in served if any(f"{n}" in str(m.model_fields["type"]) for n in here)]
    assert len(served) >= 10
    assert {name for m in served for name in m.model_fields} <= set(EVENTS)


@needs_vllm
@pytest.mark.vllm
def test_beam_search_still_leaves_a_handoff_behind() -> None:
    """The reason for which it is refused: it takes no ``extra_args``, where handoffs travel."""
    from vllm.sampling_params import BeamSearchParams

    assert "extra_args" not in BeamSearchParams.__struct_fields__
    assert FIELDS["chat"]["use_beam_search"].kind == "refused_on_handoff"


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
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
    assert {*ANSWER.values(), *CHOICE.values(), *RESPONSE.values()} == set(ANSWER_MEANING)


def test_every_refusal_has_a_fix() -> None:
    for _, name, field in EVERY:
        assert bool(field.fix) == field.kind.startswith("refused"), name
    assert get_args(Endpoint) == ENDPOINTS


def test_the_documents_page_is_the_table() -> None:
    shown = (ROOT / "docs" / "contract.md").read_text()
    assert shown == page(), "print it again, see its first lines"
