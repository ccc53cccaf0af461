"""Text hops with a real engine: a prompt that came from another agent, an answer that goes to one,
streamed or not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.engine import needs_vllm
from tests.server.proxy import ASK_COMPLAINT, COMPLAINT, NAME, NOTE, SSN, Front, error
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ASK_NAME = "What is the patient's name?"


def asked(
    front: Front, question: str, text: dict[str, Any] | None, note: str = NOTE, **more: Any
) -> httpx.Response:
    """The clerk's answer to a question on a note in its prompt."""
    messages = [{"role": "system", "content": note}, {"role": "user", "content": question}]
    handoff = None if text is None else {"text": text}
    return front.chat(front.auth("clerk", "scribes"), "", handoff, messages=messages, **more)


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def streamed(answer: httpx.Response) -> tuple[str, Any]:
    """The text of a stream, and what was applied."""
    assert answer.status_code == 200, answer.text
    text, applied = "", None
    for line in answer.text.split("\n\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
                applied = choice["delta"].get("lcguard", applied)
    return text, applied


def test_a_prompt_from_another_agent_is_guarded_before_the_model_reads_it(front: Front) -> None:
    told = {"source": "desk", "secrets": [NAME, SSN]}
    assert NAME in content(asked(front, ASK_NAME, None)), "unguarded, the model reads it"
    assert NAME not in content(asked(front, ASK_NAME, told))
    guarded = asked(front, ASK_COMPLAINT, told)
    assert COMPLAINT in content(guarded)
    assert guarded.json()["lcguard"] == {"text": {"source": "desk"}}, "no counts to the audience"
    own = NOTE.replace(NAME, "BLUE\u00a0HERON")
    assert "blue" not in content(asked(front, ASK_NAME, told, note=own)).lower()


def test_an_answer_for_another_agent_is_guarded_streamed_or_not(front: Front) -> None:
    told = {"audience": "desk", "secrets": [NAME], "conversation": "c"}
    whole = asked(front, ASK_NAME, told)
    text = content(whole)
    assert NAME not in text
    assert "[TEXT-" in text
    applied = {"text": {"audience": "desk", "hidden": {"TEXT": 1}}}
    assert whole.json()["lcguard"] == applied
    assert streamed(asked(front, ASK_NAME, told, stream=True)) == (text, applied)
    passed = content(asked(front, ASK_COMPLAINT, told))
    assert COMPLAINT in passed
    assert streamed(asked(front, ASK_COMPLAINT, told, stream=True))[0] == passed
    path = front.site.folder / "lcguard.sqlite"
    events = [
        r["event"] for r in audit_rows(path, "tenant = ? AND audience = ?", "scribes", "desk")
    ]
    assert events[-8:] == ["text", "text_guarded"] * 4


def test_what_a_text_hop_refuses(front: Front) -> None:
    assert error(asked(front, ASK_NAME, {"audience": "desk"})) == (400, "text")
    assert error(asked(front, ASK_NAME, {"audience": "archive", "secrets": []})) == (403, "policy")
    assert error(asked(front, ASK_NAME, {})) == (400, "bad_handoff")
    more: dict[str, Any] = {"logprobs": True}
    told = {"audience": "desk", "secrets": []}
    assert error(asked(front, ASK_NAME, told, **more)) == (400, "contract")
    clerk = front.auth("clerk", "scribes")
    both = {"publish": {"audience": "desk"}, "text": told}
    assert error(front.chat(clerk, "hi", both)) == (400, "bad_handoff")
    kv = front.publish(clerk, "desk", secrets=[])
    assert error(kv) == (403, "policy")
    assert "takes text alone" in kv.text
