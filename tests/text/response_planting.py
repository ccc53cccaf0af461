"""Where a value may stand in a request of the Responses API and in a model's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.text.response_events import call, custom, message, reasoning

Place = Callable[[str, str], Any]
"""A text with a value in it, and the value as it stands there -> what is sent."""


def _json(value: Any, ascii_only: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)


def _halves(text: str, written: str, kind: str) -> list[dict[str, str]]:
    at = text.index(written) + len(written) // 2
    return [{"type": kind, "text": text[:at]}, {"type": kind, "text": text[at:]}]


def _call(arguments: str, **more: Any) -> dict[str, Any]:
    made = {"type": "function_call", "call_id": "c", "name": "find", "arguments": arguments}
    return {"input": [made | more, _result("none")]}


def _result(output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": "c", "output": output}


def _said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"type": "message", "role": "assistant", "content": [*parts]}]}


def _tool(**more: Any) -> dict[str, Any]:
    return {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {}} | more]}


REQUESTS: dict[str, Place] = {
    "instructions": lambda t, w: {"instructions": t, "input": "x"},
    "input": lambda t, w: {"input": t},
    "developer": lambda t, w: {"input": [{"role": "developer", "content": t}]},
    "parts": lambda t, w: {"input": [{"role": "user", "content": _halves(t, w, "input_text")}]},
    "answer": lambda t, w: _said(*_halves(t, w, "output_text")),
    "refusal": lambda t, w: _said({"type": "refusal", "refusal": t}),
    "reasoning": lambda t, w: {
        "input": [{"type": "reasoning", "summary": [], "content": _halves(t, w, "reasoning_text")}]
    },
    "summary": lambda t, w: {
        "input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": t}]}]
    },
    "argument": lambda t, w: _call(_json({"q": t, "n": [1, 2.5]})),
    "escaped argument": lambda t, w: _call(_json({"q": [{"t": t}]}, True)),
    "argument's key": lambda t, w: _call(_json({"x": {w: True}})),
    "argument in an argument": lambda t, w: _call(_json({"body": _json({"q": t}, True)}, True)),
    "tool's name": lambda t, w: _call("{}", name=w),
    "call's id": lambda t, w: _call("{}", call_id=w),
    "result": lambda t, w: {"input": [_result(t)]},
    "result in JSON": lambda t, w: {"input": [_result(_json([{"row": 1, "text": t}]))]},
    "result's parts": lambda t, w: {"input": [_result(_halves(t, w, "input_text"))]},
    "custom input": lambda t, w: {
        "input": [{"type": "custom_tool_call", "call_id": "c", "name": "w", "input": t}]
    },
    "custom result": lambda t, w: {
        "input": [{"type": "custom_tool_call_output", "call_id": "c", "output": t}]
    },
    "tool's description": lambda t, w: _tool(description=t),
    "tool's schema": lambda t, w: _tool(parameters={"properties": {w: {"enum": [w]}}}),
    "form of the answer": lambda t, w: {
        "input": "x",
        "text": {"format": {"type": "json_schema", "name": "f", "schema": {"title": t}}},
    },
}
"""Fields of a request, by the place of the value in it."""
ITEMS: dict[str, Place] = {
    "text": lambda t, w: [message(t)],
    "JSON text": lambda t, w: [message(_json({"found": [t]}))],
    "reasoning": lambda t, w: [reasoning(t), message("So it is.")],
    "argument": lambda t, w: [message("I look."), call(_json({"q": t, "n": [1, 2.5]}))],
    "escaped argument": lambda t, w: [call(_json({"q": [{"t": t}]}, True))],
    "argument in an argument": lambda t, w: [call(_json({"b": _json({"q": t}, True)}, True))],
    "argument's key": lambda t, w: [call(_json({"x": {w: True}}))],
    "tool's name": lambda t, w: [call("{}", name=w)],
    "custom input": lambda t, w: [custom(t)],
}
"""Items of an answer."""
MESSAGES: dict[str, Place] = {
    "text": lambda t, w: {"content": t},
    "JSON text": lambda t, w: {"content": _json({"found": [t]})},
    "reasoning": lambda t, w: {"reasoning": t, "content": "So it is."},
    "refusal": lambda t, w: {"refusal": t},
    "argument": lambda t, w: _tool_calls(_json({"q": t, "n": [1, 2.5]})),
    "argument in an argument": lambda t, w: _tool_calls(_json({"b": _json({"q": t}, True)}, True)),
    "argument's key": lambda t, w: _tool_calls(_json({"x": {w: True}})),
    "tool's name": lambda t, w: _tool_calls("{}", w),
}
"""Of a chat's answer: its message."""


def _tool_calls(arguments: str, name: str = "find") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
