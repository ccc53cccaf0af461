"""The guard contract: no field reaches the engine, or the client, that nobody has judged.

Every field of a request is guarded, opaque, dropped or refused (``contract_fields``), and so is a
field that a later vLLM adds: unknown, hence refused.
"""

from __future__ import annotations

import math
from typing import Any

from lcguard.server.gateway.contract_error import NAMES, ContractError, named, shown, unknown
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
    PATHS,
    RENDERER_OPTIONS,
    RESPONSE,
    RESPONSE_USAGE,
    UNSENT,
    USAGE,
    Endpoint,
    Field,
)
from lcguard.server.gateway.response_input import check_response

_SCALARS = frozenset({str, int, float, bool, type(None)})
_NEVER_NULL = ("system", "developer", "user", "tool")


def check(
    endpoint: Endpoint, body: dict[str, Any], consuming: bool, publishing: bool
) -> dict[str, Any]:
    """A new body with the fields to forward: without null, dropped and refused but neutral ones.

    Raises ``ContractError``.
    """
    if type(body) is not dict:
        raise ContractError(f"the body is {named(body)}: send an object", None)
    fields, out = FIELDS[endpoint], dict[str, Any]()
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            raise unknown(name, fields, name)
        if value is None or field.kind == "dropped":
            continue
        if field.kind not in ("guarded", "opaque") and _refused(field, consuming, publishing):
            if type(value) is type(field.neutral) and value == field.neutral:
                continue
            raise ContractError(_refusal(name, field), name)
        kind = type(value)
        if kind not in field.types or (kind is float and not math.isfinite(value)):
            raise ContractError(f"{name} is {named(value)}: send {_either(field)}", name)
        out[name] = value
    if endpoint == "chat":
        _check_messages(out.get("messages"))
        out["messages"] = [
            {k: v for k, v in m.items() if v is None or k not in UNSENT} for m in out["messages"]
        ]
    elif endpoint == "responses":
        out |= check_response(out, consuming)
    else:
        _check_prompt(out.get("prompt"), consuming or publishing)
    _check_template_options(out.get("chat_template_kwargs"))
    return out


def describe() -> dict[str, Any]:
    """The contract as JSON."""
    return {
        "version": 1,
        "classes": dict(MEANING),
        "endpoints": {
            endpoint: {
                "path": PATHS[endpoint],
                "request": {name: _described(f) for name, f in sorted(FIELDS[endpoint].items())},
            }
            for endpoint in FIELDS
        },
        "unknown": "refused",
        "answer": {
            "classes": dict(ANSWER_MEANING),
            "fields": dict(ANSWER),
            "choices": dict(CHOICE),
            "usage": dict(USAGE),
            "unknown": "removed",
        },
        "response": {
            "fields": dict(RESPONSE),
            "output": dict(OUTPUT),
            "content": dict(CONTENT),
            "usage": dict(RESPONSE_USAGE),
            "events": dict(EVENTS),
            "unknown": "removed",
        },
    }


def markdown() -> str:
    """The contract as tables."""
    lines = ["Fields that are not listed are refused.", ""]
    lines += ["| class | meaning |", "|---|---|"]
    lines += [f"| {_words(kind)} | {meaning} |" for kind, meaning in MEANING.items()]
    lines += ["", "| field | of | class | why | instead |", "|---|---|---|---|---|"]
    for kind in MEANING:
        for name in sorted({name for fields in FIELDS.values() for name in fields}):
            alike: dict[tuple[str, str], list[Endpoint]] = {}
            for endpoint, fields in FIELDS.items():
                if (f := fields.get(name)) and f.kind == kind:
                    alike.setdefault((f.why, f.fix), []).append(endpoint)
            for (why, fix), of in alike.items():
                where = "all" if len(of) == len(FIELDS) else ", ".join(of)
                lines.append(f"| `{name}` | {where} | {_words(kind)} | {why} | {fix} |")
    lines += ["", "| answer | class |", "|---|---|"]
    for prefix, table in (("", ANSWER), ("choices[].", CHOICE), ("usage.", USAGE)):
        lines += [f"| `{prefix}{name}` | {_words(kind)} |" for name, kind in table.items()]
    lines += ["", "| response | class |", "|---|---|"]
    parts = (
        ("", RESPONSE),
        ("output[].", OUTPUT),
        ("output[].content[].", CONTENT),
        ("usage.", RESPONSE_USAGE),
        ("a stream's event: ", EVENTS),
    )
    for prefix, table in parts:
        lines += [f"| `{prefix}{name}` | {_words(kind)} |" for name, kind in table.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """``docs/contract.md``."""
    module = "lcguard.server.gateway.contract"
    command = f"python -c \"from {module} import page; print(page(), end='')\""
    return (
        "# The guard contract\n\nWhat becomes of every field of a request and of an answer, served "
        f"as JSON at `/lcguard/v1/contract`. This page is printed by `{command}`.\n\n{markdown()}"
    )


def _refused(field: Field, consuming: bool, publishing: bool) -> bool:
    match field.kind:
        case "refused_on_consume":
            return consuming
        case "refused_on_publish":
            return publishing
        case "refused_on_handoff":
            return consuming or publishing
    return True


def _refusal(name: str, field: Field) -> str:
    when = {
        "refused_on_consume": (
            " in a request that consumes segments, or whose answer is guarded as text"
        ),
        "refused_on_publish": " in a request that publishes",
        "refused_on_handoff": " in a request that publishes or consumes",
    }.get(field.kind, "")
    return f"{name} is refused{when} ({field.why}): {field.fix}"


def _check_messages(messages: list[Any] | None) -> None:
    if not messages:
        raise ContractError("messages is missing: send at least one", "messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if type(message) is not dict:
            raise ContractError(f"{where} is {named(message)}: send an object", where)
        if type(message.get("role")) is not str:
            raise ContractError(f"{where}.role is missing: send a string", f"{where}.role")
        for name, value in message.items():
            types = MESSAGE.get(name)
            if types is None:
                raise unknown(name, MESSAGE, f"{where}.{name}")
            if value is not None and type(value) not in types:
                raise ContractError(
                    f"{where}.{name} is {named(value)}, which is not allowed there",
                    f"{where}.{name}",
                )
        if message.get("content", "") is None and message["role"] in _NEVER_NULL:
            # vLLM refuses it too, in twenty lines
            raise ContractError(
                f"{where}.content is null: send a text, empty where there is none",
                f"{where}.content",
            )
        if type(parts := message.get("content")) is list:
            _check_parts(parts, f"{where}.content")


def _check_parts(parts: list[Any], where: str) -> None:
    for i, part in enumerate(parts):
        # vLLM goes by whatever media key it finds where the type is missing, or beside it.
        plain = type(part) is dict and part.keys() == {"type", "text"}
        if not plain or part["type"] != "text" or type(part["text"]) is not str:
            raise ContractError(
                f'{where}[{i}] is not {{"type": "text", "text": "..."}}: a handoff takes text, '
                "and so does every other request here",
                f"{where}[{i}]",
            )


def _check_template_options(options: dict[str, Any] | None) -> None:
    for name, value in (options or {}).items():
        param = shown(f"chat_template_kwargs.{name}")
        if name in RENDERER_OPTIONS:
            raise ContractError(
                f"{param} is an option of the renderer: use the field of that name", param
            )
        if type(value) not in _SCALARS:
            raise ContractError(f"{param} is {named(value)}: send a plain value", param)


def _check_prompt(prompt: str | list[Any] | None, handoff: bool) -> None:
    if not prompt:
        raise ContractError("prompt is missing or empty: send text or tokens", "prompt")
    if type(prompt) is str or (kinds := set(map(type, prompt))) == {int}:
        return
    if kinds != {str} and not (kinds == {list} and all({*map(type, p)} == {int} for p in prompt)):
        raise ContractError(
            "prompt is neither a string nor a list of tokens, nor a list of either", "prompt"
        )
    if handoff:
        raise ContractError(
            f"prompt holds {len(prompt)} prompts: a handoff takes one, not in a list", "prompt"
        )


def _described(field: Field) -> dict[str, Any]:
    out: dict[str, Any] = {"class": field.kind, "types": _either(field), "why": field.why}
    if field.fix:
        out["instead"] = field.fix
    if field.neutral is not None:
        out["neutral"] = field.neutral
    return out


def _either(field: Field) -> str:
    return " or ".join(sorted(NAMES[t] for t in field.types))


def _words(kind: str) -> str:
    return kind.replace("_", " ")
