"""The chat that vLLM makes of a response's request, for its tokenizing route, which takes chats.

Should vLLM render a request otherwise, its engine refuses it: spans travel with a digest of the
tokens on which they were counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.server.errors import ProxyError

Message = dict[str, Any]
_GOES_ON = ("in_progress", "incomplete")
_OF_TOOL = ("name", "description", "parameters", "strict")


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Of a body that the contract has passed, whose items have one form each.

    Raises ``ProxyError`` (400) for custom tools.
    """
    given, messages = body["input"], list[Message]()
    if instructions := body.get("instructions"):
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for item in given:
            _add(messages, item)
    last = given[-1] if given and not isinstance(given, str) else {}
    goes_on = last.get("status") in _GOES_ON and last["type"] in ("message", "reasoning")
    shared = ("model", "chat_template_kwargs", "kv_transfer_params")
    out: dict[str, Any] = {k: body[k] for k in shared if k in body}
    out |= {"messages": messages, "add_special_tokens": True}
    out |= {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    if tools := [made for tool in body.get("tools", ()) for made in _tools(tool)]:
        out["tools"] = tools
    if effort := (body.get("reasoning") or {}).get("effort"):
        out["reasoning_effort"] = effort
    return out


def _add(messages: list[Message], item: Mapping[str, Any]) -> None:
    """What an answer consists of belongs to one message of the assistant's."""
    match item["type"]:
        case "message" if item["role"] == "assistant":
            _say(messages, "content", item["content"][0]["text"])
        case "message":
            messages.append({"role": item["role"], "content": _content(item["content"])})
        case "reasoning":
            said = item["content"][0]["text"] if item["content"] else ""
            _say(messages, "reasoning", said)
        case "function_call":
            space = f"{item['namespace']}__" if item.get("namespace") else ""
            function = {"name": space + item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "tool_calls": [call]})
        case "function_call_output":
            content = _content(item["output"])
            messages.append({"role": "tool", "content": content, "tool_call_id": item["call_id"]})
        case _:
            raise _custom()


def _say(messages: list[Message], name: str, text: str) -> None:
    if messages and messages[-1]["role"] == "assistant" and messages[-1].get(name) is None:
        messages[-1][name] = text
    else:
        messages.append({"role": "assistant", name: text})


def _content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} for part in content]


def _tools(tool: Mapping[str, Any]) -> list[dict[str, Any]]:
    if tool["type"] == "custom":
        raise _custom()
    if tool["type"] == "function":
        return [{"type": "function", "function": {k: tool[k] for k in _OF_TOOL if k in tool}}]
    inner = [made for one in tool["tools"] for made in _tools(one)]
    for made in inner:
        made["function"]["name"] = f"{tool.get('name')}__{made['function'].get('name')}"
    return inner


def _custom() -> ProxyError:
    return ProxyError(
        400, "what to redact is not counted in custom tools: send functions", code="spans"
    )
