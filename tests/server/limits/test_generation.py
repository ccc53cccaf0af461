"""What a request may generate is bounded as a whole, and said to vLLM where it says nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.server.errors import ProxyError
from lcguard.server.limits.generation import Size, bounded_size

MOST = 32


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}]} | more


def size(body: dict[str, Any], most: int = MOST, **more: Any) -> Size:
    endpoint: Any = "chat" if "messages" in body else "completions"
    options: dict[str, Any] = {"context": None, "per_min": None} | more
    return bounded_size(endpoint, body, 400, most, **options)


def test_a_request_that_states_no_maximum_gets_one() -> None:
    body = chat()
    assert size(body) == Size(100, MOST)
    assert body["max_completion_tokens"] == MOST
    several = chat(n=4)
    assert size(several).output == 4 * several["max_completion_tokens"] == MOST
    prompts = {"prompt": ["a"] * 8}
    assert size(prompts).output == 8 * prompts["max_tokens"] == MOST
    text = {"prompt": "a"}
    assert size(text, 8192).output == text["max_tokens"] == 16  # OpenAI's
    within = chat()
    assert size(within, 8192, context=700).output == within["max_completion_tokens"] == 700


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (chat(max_tokens=33), "max_tokens=33: at most 32 tokens in all"),
        (chat(max_tokens=1, max_completion_tokens=33), "max_completion_tokens=33"),
        (chat(max_tokens=32, n=64), "max_tokens=32 for each of 64 answers: at most 32"),
        ({"prompt": ["a"] * 200, "max_tokens": 32}, "for each of 200 answers"),
        ({"prompt": [[1, 2]] * 20, "max_tokens": 1, "n": 2}, "for each of 40 answers"),
        ({"prompt": ["a"] * 200}, "200 answers of a token each: at most 32"),
        (chat(n=33), "33 answers of a token each"),
    ],
)
def test_more_in_all_is_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ProxyError, match=says) as refused:
        size(body)
    assert (refused.value.status, refused.value.code) == (400, "max_tokens")


def test_a_key_s_minute_bounds_what_is_not_stated() -> None:
    body = chat()
    assert size(body, 8192, per_min=160) == Size(100, 60)
    assert body["max_completion_tokens"] == 60
    assert size(chat(max_tokens=500), 8192, per_min=160).total == 600  # too large ever: 413 later


@given(
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(-3, 40)),
    st.integers(1, 20),
    st.integers(1, 4000),
    st.one_of(st.none(), st.integers(1, 500)),
)
def test_nothing_generates_more_than_was_set_aside(
    n: int, stated: int | None, prompts: int, most: int, per_min: int | None
) -> None:
    body: dict[str, Any] = {"prompt": ["a"] * prompts, "n": n}
    if stated is not None:
        body["max_tokens"] = stated
    try:
        found = size(body, most, per_min=per_min)
    except ProxyError:
        return
    assert max(0, body["max_tokens"]) * n * prompts == found.output <= most
