"""The guard contract on the input of a response: its items, each in the one form that is forwarded.

What an engine may be sent as several parts of which it reads the first alone (an assistant's
message, reasoning) is sent as one, so that the guard has read what the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.server.gateway.contract_error import ContractError, named, shown, unknown
from lcguard.server.gateway.contract_fields import ITEMS, REQUIRED

_ROLES = ("user", "system", "developer", "assistant")
_TOOLS = ("function", "custom", "namespace")
"""Kinds of tools that the client runs; all others would run beside the engine, unguarded."""
_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = ("reasoning.encrypted_content", _LOGPROBS)
_TEXT = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Parts of a message's content, and where their text is."""
_UNREAD = frozenset({"annotations", "logprobs"})


def check_response(body: Mapping[str, Any], consuming: bool) -> dict[str, Any]:
    """What is forwarded of ``input``, ``tools`` and ``include``. Raises ``ContractError``."""
    out = dict[str, Any]()
    given = body.get("input")
    if given is None or (not given and not body.get("instructions")):
        raise ContractError("input is missing or empty: send text or items", "input")
    out["input"] = given if type(given) is str else _items(given)
    for i, tool in enumerate(body.get("tools", ())):
        _check_tool(tool, f"tools[{i}]", _TOOLS)
    if "include" in body:
        for name in body["include"]:
            if name not in _INCLUDED or (consuming and name == _LOGPROBS):
                raise ContractError(
                    f"include names {shown(str(name))}, which is refused here: leave it out",
                    "include",
                )
        out["include"] = body["include"]
    return out


def _check_tool(tool: Any, where: str, kinds: tuple[str, ...]) -> None:
    if type(tool) is not dict or tool.get("type") not in kinds:
        raise ContractError(
            f"{where} is no tool that its client runs: send type {' or '.join(kinds)}", where
        )
    if tool["type"] == "namespace":
        if type(tool.get("tools")) is not list:
            raise ContractError(f"{where}.tools is missing: send a list", f"{where}.tools")
        for i, inner in enumerate(tool["tools"]):
            _check_tool(inner, f"{where}.tools[{i}]", ("function",))


def _items(items: list[Any]) -> list[dict[str, Any]]:
    return [_item(item, f"input[{i}]") for i, item in enumerate(items)]


def _item(item: Any, where: str) -> dict[str, Any]:
    if type(item) is not dict:
        raise ContractError(f"{where} is {named(item)}: send an object", where)
    kind = item.get("type", "message" if "role" in item else None)
    if type(kind) is not str or kind not in ITEMS:
        raise ContractError(
            f"{where}.type is none that is read here: send {', '.join(ITEMS)}; what OpenAI keeps "
            "and names by an id, and the items of its own tools, are not here",
            f"{where}.type",
        )
    fields = ITEMS[kind]
    for name, value in item.items():
        if name == "type":
            continue
        if name not in fields:
            raise unknown(name, fields, f"{where}.{name}")
        if value is not None and type(value) not in fields[name]:
            raise ContractError(
                f"{where}.{name} is {named(value)}, which is not allowed there", f"{where}.{name}"
            )
    for name in REQUIRED[kind]:
        if item.get(name) is None:
            raise ContractError(f"{where}.{name} is missing: send it", f"{where}.{name}")
    match kind:
        case "message":
            return _message(item, where)
        case "reasoning":
            return _reasoning(item, where)
        case "function_call_output" | "custom_tool_call_output":
            given = item["output"]
            if type(given) is list:
                given = [
                    {"type": "input_text", "text": text}
                    for text in _texts(given, f"{where}.output", ("input_text",))
                ]
            return {"type": kind, "call_id": item["call_id"], "output": given}
    return {"type": kind} | {k: v for k, v in item.items() if v is not None and k != "type"}


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = item["role"], item["content"]
    if role not in _ROLES:
        raise ContractError(f"{where}.role: send {', '.join(_ROLES)}", f"{where}.role")
    if role != "assistant":
        if type(content) is list:
            content = [
                {"type": "input_text", "text": text}
                for text in _texts(content, f"{where}.content", ("input_text",))
            ]
        return {"type": "message", "role": role, "content": content}
    if type(content) is list:
        content = "".join(_texts(content, f"{where}.content", tuple(_TEXT)))
    text = {"type": "output_text", "text": content, "annotations": list[Any]()}
    # as an answer's item, of which alone it is read that it goes on
    return {"type": "message", "role": role, "content": [text], **_marks(item)}


def _reasoning(item: dict[str, Any], where: str) -> dict[str, Any]:
    said = _texts(item.get("content") or [], f"{where}.content", ("reasoning_text",))
    told = _texts(item.get("summary") or [], f"{where}.summary", ("summary_text",))
    text = "".join(said) if said else "\n".join(told)
    content = [{"type": "reasoning_text", "text": text}] if said or told else []
    return {"type": "reasoning", "summary": [], "content": content, **_marks(item)}


def _marks(item: Mapping[str, Any]) -> dict[str, Any]:
    return {k: item[k] for k in ("id", "status") if item.get(k) is not None}


def _texts(parts: list[Any], where: str, kinds: tuple[str, ...]) -> list[str]:
    out = []
    for i, part in enumerate(parts):
        kind = part.get("type") if type(part) is dict else None
        name = _TEXT.get(kind, "text") if type(kind) is str else "text"
        if (
            type(part) is not dict
            or kind not in kinds
            or type(part.get(name)) is not str
            or {k for k, v in part.items() if v is not None} - {"type", name} - _UNREAD
        ):
            form = " or ".join(f'{{"type": "{k}", "{_TEXT.get(k, "text")}": "..."}}' for k in kinds)
            raise ContractError(
                f"{where}[{i}] is not {form}: every request here takes text alone", f"{where}[{i}]"
            )
        out.append(part[name])
    return out
