"""The guard contract's other half: what of an answer goes to the client.

``lcguard`` is added by the caller: the engine's own, if any, is not passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.server.gateway.contract_fields import (
    ANSWER,
    CHOICE,
    CONTENT,
    EMPTY,
    EVENTS,
    OUTPUT,
    RESPONSE,
    RESPONSE_USAGE,
    USAGE,
)


def clean(answer: Mapping[str, Any], consuming: bool, unsaid_tokens: int = 0) -> dict[str, Any]:
    """What of a chat's or a text's answer, or of a piece of its stream, goes to the client.

    Args:
        unsaid_tokens: added to the prompt's count, which would tell how long what was consumed is.
    """
    out = _passed(answer, ANSWER, consuming)
    if isinstance(usage := out.get("usage"), Mapping):
        out["usage"] = _counted(usage, USAGE, consuming, unsaid_tokens, "prompt_tokens")
    if type(choices := out.get("choices")) is list:
        out["choices"] = [_passed(c, CHOICE, consuming) for c in choices if isinstance(c, Mapping)]
    return out


def clean_response(
    response: Mapping[str, Any], consuming: bool, unsaid_tokens: int = 0
) -> dict[str, Any]:
    """``clean`` of a response."""
    out = _passed(response, RESPONSE, consuming)
    if isinstance(usage := out.get("usage"), Mapping):
        out["usage"] = _counted(usage, RESPONSE_USAGE, consuming, unsaid_tokens, "input_tokens")
    if type(items := out.get("output")) is list:
        out["output"] = [_item(item, consuming) for item in items if isinstance(item, Mapping)]
    return out


def clean_event(
    event: Mapping[str, Any], consuming: bool, unsaid_tokens: int = 0
) -> dict[str, Any]:
    """``clean`` of an event of a response's stream."""
    out = _passed(event, EVENTS, consuming)
    if isinstance(response := out.get("response"), Mapping):
        out["response"] = clean_response(response, consuming, unsaid_tokens)
    if isinstance(item := out.get("item"), Mapping):
        out["item"] = _item(item, consuming)
    if isinstance(part := out.get("part"), Mapping):
        out["part"] = _passed(part, CONTENT, consuming)
    return out


def _item(item: Mapping[str, Any], consuming: bool) -> dict[str, Any]:
    out = _passed(item, OUTPUT, consuming)
    for name in ("content", "summary"):
        if type(parts := out.get(name)) is list:
            out[name] = [_passed(p, CONTENT, consuming) for p in parts if isinstance(p, Mapping)]
    return out


def _counted(
    usage: Mapping[str, Any],
    table: Mapping[str, str],
    consuming: bool,
    unsaid_tokens: int,
    of_prompt: str,
) -> dict[str, Any]:
    out = _passed(usage, table, consuming)
    for name in (of_prompt, "total_tokens"):
        if type(n := usage.get(name)) is int:
            out[name] = n + unsaid_tokens
    return out


def _passed(data: Mapping[str, Any], table: Mapping[str, str], consuming: bool) -> dict[str, Any]:
    out = dict[str, Any]()
    for name, value in data.items():
        match table.get(name):
            case "passed":
                out[name] = value
            case "removed_on_consume" if not consuming:
                out[name] = value
            case "emptied_on_consume":
                out[name] = EMPTY.get(name) if consuming else value
    return out
