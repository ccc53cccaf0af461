"""A stream with a handoff, as common clients read it: the real openai package's helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from openai import OpenAI

from tests.engine import needs_vllm
from tests.server.proxy import COMPLAINT, NOTE, Front

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PUBLISH: Any = {
    "model": "nano",
    "max_tokens": 3,
    "messages": [{"role": "system", "content": NOTE}],
    "extra_body": {"add_generation_prompt": False, "lcguard": {"publish": {"audience": "open"}}},
}
Clients = Callable[[str], OpenAI]
ASK: Any = [{"role": "user", "content": "What is the chief complaint?"}]


@pytest.fixture
def client(front: Front) -> Iterator[Clients]:
    """Makes an agent's client; a socket left open would be a later test's failure."""
    with ExitStack() as clients:

        def made(agent: str) -> OpenAI:
            key = front.auth(agent)["Authorization"].removeprefix("Bearer ")
            url = f"{front.url}/v1"
            return clients.enter_context(OpenAI(base_url=url, api_key=key, max_retries=0))

        yield made


@pytest.mark.parametrize("usage", [False, True])
def test_the_stream_helper_s_final_completion_has_the_handle(usage: bool, client: Clients) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    with client("intake").chat.completions.stream(**PUBLISH, **options) as stream:
        assert {event.type for event in stream} >= {"chunk"}
        final = stream.get_final_completion()
    message: Any = final.choices[0].message
    made = message.lcguard["published"]
    assert final.choices[0].finish_reason
    assert (final.usage is not None) is usage
    with client("open").chat.completions.stream(
        model="nano",
        max_tokens=16,
        temperature=0,
        messages=ASK,
        extra_body={"lcguard": {"consume": [made["handle"]]}},
    ) as stream:
        read: Any = stream.get_final_completion().choices[0].message
    assert COMPLAINT in read.content
    assert [s["handle"] for s in read.lcguard["consumed"]] == [made["handle"]]


def test_every_chunk_has_a_choice_to_read(client: Clients) -> None:
    """Clients that take ``chunk.choices[0]`` of each chunk, as most examples do."""
    chunks = list(client("intake").chat.completions.create(**PUBLISH, stream=True))
    finish = [bool(chunk.choices[0].finish_reason) for chunk in chunks]
    assert finish == [False] * (len(chunks) - 1) + [True]
    last: Any = chunks[-1]
    assert last.lcguard == last.choices[0].delta.lcguard
    assert all("lcguard" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_several_answers_end_with_one_that_says_it(front: Front, client: Clients) -> None:
    handle = front.handle(front.auth("intake"), "open")
    chunks = list(
        client("open").chat.completions.create(
            model="nano",
            max_tokens=4,
            temperature=1,
            messages=ASK,
            n=3,
            stream=True,
            extra_body={"lcguard": {"consume": [handle]}},
        )
    )
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert sum(bool(chunk.choices[0].finish_reason) for chunk in chunks) == 3
    said = [bool((chunk.model_extra or {}).get("lcguard")) for chunk in chunks]
    assert said == [False] * (len(chunks) - 1) + [True]


def test_a_stop_string_ends_a_publish_like_any_other(front: Front) -> None:
    """vLLM's engine does not know of it: the store has the last word."""
    asked = {"messages": [*PUBLISH["messages"], *ASK], "stop": [COMPLAINT]}
    answer = front.chat(front.auth("intake"), "", {"publish": {"audience": "open"}}, **asked)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", COMPLAINT)
    handle = answer.json()["lcguard"]["published"]["handle"]
    assert COMPLAINT in front.answer(front.auth("open"), ASK[0]["content"], handle)


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_s_id_names_the_segment_too(front: Front, stream: bool, client: Clients) -> None:
    """For frameworks that show no more of an answer than OpenAI's fields."""
    made: Any = client("intake").chat.completions.create(**PUBLISH, stream=stream)
    answer_id = list(made)[-1].id if stream else made.id
    assert COMPLAINT in front.answer(front.auth("open"), ASK[0]["content"], answer_id)
    text: Any = client("intake").completions.create(
        model="nano",
        prompt=NOTE,
        max_tokens=1,
        extra_body={"lcguard": {"publish": {"audience": "open"}}},
    )
    assert text.id == f"cmpl-{text.lcguard['published']['handle']}"
    refused = front.ask(front.auth("mallory"), ASK[0]["content"], text.id)
    assert refused.status_code == 403


def test_whole_answers_and_headers_say_it_too(client: Clients) -> None:
    raw = client("intake").chat.completions.with_raw_response.create(**PUBLISH)
    answer: Any = raw.parse()
    made = answer.lcguard["published"]
    assert answer.choices[0].message.lcguard["published"] == made
    assert raw.headers["x-lcguard-handle"] == made["handle"]
    # and the message may stand in the history of the next request
    back = [*ASK, answer.choices[0].message.model_dump(exclude_none=True), *ASK]
    again = client("intake").chat.completions.create(model="nano", max_tokens=2, messages=back)
    assert again.choices[0].finish_reason
