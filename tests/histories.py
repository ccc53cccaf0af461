"""Histories of conversations as agents' frameworks send them, with a secret somewhere inside."""

from __future__ import annotations

import json
import random
from typing import Any

SECRET = "912-55-1029"
WRITTEN = (SECRET, "912551029", "912\u201155\u20111029", "912 55 1029", "**912**-55-1029")
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Finds a person.",
        "parameters": {"type": "object", "properties": {"ssn": {"type": "string"}}},
    },
}


def history(seed: int) -> dict[str, Any]:
    """The body of a chat request: most as frameworks send them, some malformed."""
    rng = random.Random(seed)
    say = _Speaker(rng)
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.7:
        role = rng.choice(("system", "system", "developer"))
        messages.append({"role": role, "content": say.content()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": say.content()})
        if rng.random() < 0.1:
            messages[-1]["name"] = "ada"
        if rng.random() < 0.7:
            messages += _tools(rng, say)
        if rng.random() < 0.7:
            messages.append(_said(rng, say))
    if rng.random() < 0.1:
        messages.insert(rng.randrange(len(messages)), {"role": "system", "content": say.text()})
    body: dict[str, Any] = {"model": "nano", "messages": messages}
    if rng.random() < 0.5:
        body["tools"] = [TOOL] * rng.randint(1, 2)
        if rng.random() < 0.4:
            body["tool_choice"] = rng.choice(("auto", "none", "required"))
    if rng.random() < 0.3:
        body["add_generation_prompt"] = rng.random() < 0.5
    if messages[-1]["role"] == "assistant" and rng.random() < 0.3:
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    if rng.random() < 0.15:
        body["chat_template_kwargs"] = {"enable_thinking": rng.random() < 0.5}
    if rng.random() < 0.1:
        body["reasoning_effort"] = rng.choice(("none", "low", "high"))
    if rng.random() < 0.05:
        body["documents"] = [{"title": "a", "text": say.text()}]
    if rng.random() < 0.08:
        _spoil(rng, body)
    return body


class _Speaker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def text(self) -> str:
        written = self.rng.choice(WRITTEN)
        return self.rng.choice(
            (
                f"My number is {written}.",
                "What is the status?",
                "",
                "é 日本 🙂\n- a\n- b",
                f'{{"ssn": "{written}"}}',
                f"SSN_{written}_END",
                "Done.\n\n",
                "  spaced  ",
            )
        )

    def content(self) -> Any:
        """A text, or parts; a number may be split over two of them."""
        if self.rng.random() < 0.7:
            return self.text()
        halves = [{"type": "text", "text": t} for t in ("it is 912-55-", "1029, I think")]
        others = [{"type": "text", "text": self.text()} for _ in range(self.rng.randint(0, 3))]
        return self.rng.choice((halves, others))


def _said(rng: random.Random, say: _Speaker) -> dict[str, Any]:
    """An assistant's answer, as an SDK sends its own objects back."""
    out: dict[str, Any] = {"role": "assistant", "content": say.content()}
    if rng.random() < 0.3:
        out |= {
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": rng.choice((None, [])),
        }
    if rng.random() < 0.3:
        out[rng.choice(("reasoning_content", "reasoning"))] = rng.choice((None, say.text()))
    return out


def _tools(rng: random.Random, say: _Speaker) -> list[dict[str, Any]]:
    """Calls of tools, and what the tools answered."""
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": "lookup", "arguments": _arguments(rng, say)},
        }
        for i in range(rng.randint(1, 3))
    ]
    asked: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    if rng.random() < 0.7:
        asked["content"] = rng.choice((None, "", say.content()))
    if rng.random() < 0.2:
        asked["reasoning_content"] = say.text()
    out = [asked]
    for call in calls:
        result: dict[str, Any] = {"role": "tool", "tool_call_id": call["id"]}
        kind = rng.random()
        if kind < 0.9:
            result["content"] = rng.choice((say.text(), say.content(), "null", "[]", ""))
        elif kind < 0.95:
            result["content"] = None
        if rng.random() < 0.2:
            result["name"] = "lookup"
        out.append(result)
    return out


def _arguments(rng: random.Random, say: _Speaker) -> Any:
    """As models write them: JSON, mostly."""
    value = {"ssn": say.text(), "n": rng.choice((1, 2.5, None, True, [1, "x"], {"a": {}}))}
    return rng.choice(
        (
            json.dumps(value),
            json.dumps(value, ensure_ascii=False),
            json.dumps(json.dumps(value)),
            "{}",
            "",
            "null",
            "[]",
            "42",
            '{"ssn": "912-55',
            "{'ssn': 1}",
        )
    )


def _spoil(rng: random.Random, body: dict[str, Any]) -> None:
    """Something that no framework should send, and some do."""
    message = rng.choice(body["messages"])
    rng.choice(
        (
            lambda: message.update(content=None),
            lambda: message.update(role="alien"),
            lambda: message.pop("content", None),
            lambda: body.update(tools=[]),
            lambda: message.update(tool_calls=[{"id": "1"}]),
            lambda: message.update(tool_calls=[None]),
            lambda: message.update(
                tool_calls=[
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "lookup", "arguments": {"ssn": SECRET}},
                    }
                ]
            ),
            lambda: message.update(tool_calls=[{"type": "custom", "custom": {}}]),
            lambda: message.update(content="lone \ud800 surrogate"),
            lambda: body.update(continue_final_message=True),
            lambda: body.update(tools=[{"type": "function", "function": None}]),
            lambda: body.update(tools=[5]),
            lambda: message.update(role=""),
            lambda: message.update(content=[]),
            lambda: message.update(name=""),
            lambda: body.update(documents=["text"]),
        )
    )()
