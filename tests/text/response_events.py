"""The events in which vLLM 0.32 sends the items of a response; a test holds them against vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Cut = Callable[[str], list[str]]
_CALLS = {
    "function_call": ("response.function_call_arguments", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input", "input"),
}


def cut_at(*cuts: int) -> Cut:
    """Cuts every text at these characters."""

    def cut(text: str) -> list[str]:
        ends = [0, *sorted({c for c in cuts if 0 < c < len(text)}), len(text)]
        return [text[a:b] for a, b in pairwise(ends)]

    return cut


def every_character(text: str) -> list[str]:
    return list(text)


def message(text: str) -> dict[str, Any]:
    part = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    return {
        "id": "msg_" + "0" * 16,
        "content": [part] if text else [],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def reasoning(text: str) -> dict[str, Any]:
    return {
        "id": "rs_" + "0" * 16,
        "summary": [],
        "type": "reasoning",
        "content": [{"text": text, "type": "reasoning_text"}],
        "encrypted_content": None,
        "status": "completed",
    }


def call(arguments: str, name: str = "find") -> dict[str, Any]:
    return {
        "arguments": arguments,
        "call_id": "call_1",
        "name": name,
        "type": "function_call",
        "id": "fc_" + "0" * 16,
        "namespace": None,
        "status": "completed",
    }


def custom(text: str) -> dict[str, Any]:
    return {
        "call_id": "call_2",
        "input": text,
        "name": "write",
        "type": "custom_tool_call",
        "id": "ctc_" + "0" * 16,
        "namespace": None,
    }


def response(items: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A whole one."""
    usage = {"input_tokens": 9, "output_tokens": 30, "total_tokens": 39}
    head = {"id": "resp_1", "created_at": 1, "object": "response", "model": "nano"}
    return {**head, "status": "completed", "output": [*items], "usage": usage, **more}


def events(items: Sequence[dict[str, Any]], cut: Cut, **more: Any) -> list[dict[str, Any]]:
    """Those of a stream; ``more``: fields of the response."""
    begun = response([], **more) | {"status": "in_progress", "usage": None}
    out: list[dict[str, Any]] = [
        {"type": f"response.{step}", "response": begun} for step in ("created", "in_progress")
    ]
    for index, item in enumerate(items):
        out += [{**e, "output_index": index} for e in _of_item(item, cut)]
    out.append({"type": "response.completed", "response": response(items, **more)})
    return [{**e, "sequence_number": n} for n, e in enumerate(out)]


def _of_item(item: dict[str, Any], cut: Cut) -> list[dict[str, Any]]:
    at = {"item_id": item["id"]}
    begun = {**item, "status": "in_progress"} if "status" in item else {**item}
    last = {"type": "response.output_item.done", "item": item}
    if item["type"] in _CALLS:
        name, field = _CALLS[item["type"]]
        done = {field: item[field]} | ({"name": item["name"]} if field == "arguments" else {})
        return [
            {"type": "response.output_item.added", "item": begun | {field: ""}},
            *[{"type": f"{name}.delta", **at, "delta": d} for d in cut(item[field]) if d],
            {"type": f"{name}.done", **at, **done},
            last,
        ]
    thought = item["type"] == "reasoning"
    name = "response.reasoning_text" if thought else "response.output_text"
    begun["content"] = None if thought else []
    part = item["content"][0] if item["content"] else message("x")["content"][0] | {"text": ""}
    at |= {"content_index": 0}
    more = {} if thought else {"logprobs": []}
    return [
        {"type": "response.output_item.added", "item": begun},
        {"type": "response.content_part.added", **at, "part": {**part, "text": "", **more}},
        *[{"type": f"{name}.delta", **at, "delta": d, **more} for d in cut(part["text"]) if d],
        {"type": f"{name}.done", **at, "text": part["text"], **more},
        {"type": "response.content_part.done", **at, "part": part},
        last,
    ]


def read(sent: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client puts them together. What events repeat is held against each other."""
    said: dict[tuple[int, str], str] = {}
    done: dict[int, dict[str, Any]] = {}
    order = [e["sequence_number"] for e in sent]
    assert order == list(range(len(sent)))
    for e in sent:
        kind = str(e["type"])
        index = e.get("output_index", -1)
        if kind == "response.output_item.added":
            assert index not in done
            assert index == len(done), "one item after the other"
        elif kind.endswith(".delta"):
            assert e["delta"], "no empty pieces"
            assert index not in done
            said[index, kind] = said.get((index, kind), "") + e["delta"]
        elif kind == "response.output_item.done":
            done[index] = e["item"]
        elif kind == "response.content_part.done":
            assert e["part"]["text"] == _said(said, index, ("output_text", "reasoning_text"))
        elif kind.endswith(".done"):
            stem = kind.removesuffix(".done").removeprefix("response.")
            (text,) = (e[k] for k in ("text", "arguments", "input") if k in e)
            assert text == _said(said, index, (stem,)), kind
    last = sent[-1]
    assert last["type"] == "response.completed"
    items: list[dict[str, Any]] = last["response"]["output"]
    assert [done[i] for i in sorted(done)] == items
    return items


def _said(said: dict[tuple[int, str], str], index: int, stems: Sequence[str]) -> str:
    return "".join(said.get((index, f"response.{stem}.delta"), "") for stem in stems)
