"""The strings and numbers of a JSON value, in the order in which they are read.

Of chat messages (OpenAI's chat and Responses forms, and what is built like them) the names of
fields and the words of ``type`` and ``role`` are structure and stay; whatever else is a string or a
number may hold a value: contents and their parts, names and ids, a tool call's arguments, its
result, reasoning, a refusal. Of any other JSON value the keys may as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lcguard.handoff.errors import HandoffError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NAMES = frozenset(
    "role type content text name id call_id tool_call_id tool_calls function function_call "
    "arguments output input refusal reasoning reasoning_content summary thinking annotations "
    "status index custom parameters strict description phase namespace async logprobs "
    "encrypted_content".split()
)
_TYPES = frozenset(
    "text input_text output_text refusal reasoning reasoning_text summary_text thinking message "
    "function custom function_call function_call_output custom_tool_call tool_use tool_result "
    "custom_tool_call_output".split()
)
_MEDIA = frozenset(
    "image_url input_image image audio input_audio video video_url audio_url file input_file "
    "file_data image_embeds audio_embeds".split()
)
REASONING = ("reasoning", "reasoning_content")
_MADE = {
    "id": re.compile(r"[a-z]{2,4}_[0-9a-f]{16,64}"),
    "status": re.compile(r"completed|in_progress|incomplete"),
}
"""What the engine, and not the model, writes into an answer's items."""
_JSON_FIELDS = frozenset({"arguments", "output"})
_DEEPEST = 64
"""Levels of a value; OpenAI's requests have fewer than ten, before a tool's own."""


@dataclass(frozen=True)
class Spot:
    """Where a string or a number stands."""

    group: int = 0
    """What a value may be split over: one message, or one JSON value."""
    run: int | None = None
    """Texts that are read as one, one behind the other: the parts of a message's content."""
    is_number: bool = False
    scalars: bool = False
    """Whether a number or a string alone is JSON there: in a tool call's arguments."""


@dataclass(frozen=True)
class _At:
    spot: Spot = field(default_factory=Spot)
    chat: bool = False
    """Whether the names of fields are structure."""
    depth: int = 0


class Walk:
    """Makes a value anew, with ``visit`` of every string and number of it."""

    def __init__(self, visit: Callable[[str, Spot], str]) -> None:
        """``visit`` is given a number as JSON writes it; where it returns another text than it was
        given, a string stands in the number's place."""
        self._visit = visit
        self._runs = 0

    def json(self, value: Any) -> Any:
        """Any JSON value. Raises ``HandoffError`` (400) for what is none."""
        return self._value(value, _At())

    def messages(self, messages: Sequence[Any], group: int = 0) -> list[Any]:
        """Messages of a chat, or items that are built like them. Raises as ``json``."""
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            raise _bad(f"messages is a {type(messages).__name__}: give a list of messages")
        return [self.message(m, group + i) for i, m in enumerate(messages)]

    def choices(self, choices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of an answer: what the model wrote. Raises as ``json``."""
        out = []
        for i, choice in enumerate(choices):
            made = dict(choice)
            for name in ("message", "delta"):
                if isinstance(choice.get(name), Mapping):
                    made[name] = self.message(choice[name], i)
            for name in ("text", "stop_reason"):
                if isinstance(choice.get(name), str):
                    made[name] = self.text(choice[name], i)
            out.append(made)
        return out

    def output(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The items of an answer of the Responses API: what the model wrote, as one message, so
        that nothing else stands between two of them. Raises as ``json``."""
        out = []
        for item in items:
            made: Any = self.message({k: v for k, v in item.items() if not is_made(k, v)})
            out.append({k: made.get(k, v) for k, v in item.items()})
        return out

    def text(self, text: str, group: int = 0) -> str:
        """A text that is read as one."""
        self._runs += 1
        return self._visit(text, Spot(group, self._runs))

    def message(self, message: Any, group: int = 0) -> Any:
        """One of them: a text, or an object. Raises as ``json``."""
        if not isinstance(message, str | Mapping):
            raise _bad(
                f"message {group} is a {type(message).__name__}: give a dict (a model's "
                "model_dump()) or a string"
            )
        self._runs += 1
        return self._value(message, _At(Spot(group, self._runs), chat=True))

    def _value(self, value: Any, at: _At) -> Any:
        if at.depth > _DEEPEST:
            raise _bad(f"a value is nested more than {_DEEPEST} deep: send a flatter one")
        at = replace(at, depth=at.depth + 1)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._visit(value, at.spot)
        if isinstance(value, int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise _bad(f"{value} is no JSON number: send a finite one")
            digits = json.dumps(value)
            shown = self._visit(digits, replace(at.spot, run=None, is_number=True))
            return value if shown == digits else shown
        if isinstance(value, Mapping):
            return self._object(value, at)
        if isinstance(value, list | tuple):
            made = [self._value(item, at) for item in value]
            return made if isinstance(value, list) else tuple(made)
        raise _bad(f"a {type(value).__name__} is no JSON value: give text, numbers, lists, dicts")

    def _object(self, value: Mapping[Any, Any], at: _At) -> dict[str, Any]:
        out: dict[str, Any] = {}
        made_of: dict[str, str] = {}
        for name, item in sorted(value.items(), key=_read_first) if at.chat else value.items():
            if not isinstance(name, str):
                raise _bad(f"a key is a {type(name).__name__}: give strings")
            structure = at.chat and name in _NAMES
            made = name if structure else self._visit(name, replace(at.spot, run=None))
            made = made_of[name] = _free(made, out)
            if at.chat and item is not None and (name in _MEDIA or _is_media(name, item)):
                raise _bad(
                    f"a part of {item if name == 'type' else name}: nobody can look through media, "
                    "send text alone"
                )
            if at.chat and _is_word(name, item):
                out[made] = item
            else:
                out[made] = self._value(item, self._below(at, name, value))
        return {made_of[name]: out[made_of[name]] for name in value}

    def _below(self, at: _At, name: str, parent: Mapping[Any, Any]) -> _At:
        """Where the value of a field stands."""
        if not at.chat:
            return at
        spot = at.spot
        if name in ("content", "text", "refusal") and spot.run is not None:
            result = name == "content" and parent.get("role") in ("tool", "function")
            return replace(at, spot=replace(spot, scalars=spot.scalars or result))
        if name in _JSON_FIELDS:
            is_text = isinstance(parent[name], list) and name == "output"
            self._runs += is_text
            run = self._runs if is_text else None
            return replace(at, spot=replace(spot, run=run, scalars=True), chat=is_text)
        if name == "summary" or (name == "input" and isinstance(parent[name], list)):
            self._runs += 1
            return replace(at, spot=replace(spot, run=self._runs))
        known = name in _NAMES and name not in ("input", "parameters")
        return replace(at, spot=replace(spot, run=None), chat=known)


def is_made(name: str, value: Any) -> bool:
    """Whether the field of an answer's item is the engine's own word."""
    form = _MADE.get(name)
    return form is not None and isinstance(value, str) and form.fullmatch(value) is not None


def _read_first(field: tuple[Any, Any]) -> bool:
    """Reasoning comes before what it leads to, wherever it stands in a message."""
    return field[0] not in REASONING


def _is_word(name: str, value: Any) -> bool:
    if name == "index":  # of a choice or a tool call
        return type(value) is int and 0 <= value < 1000
    words = {"role": ROLES, "type": _TYPES}.get(name, frozenset())
    return isinstance(value, str) and value in words


def _is_media(name: str, value: Any) -> bool:
    return name == "type" and isinstance(value, str) and value in _MEDIA


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Two spellings of a value as keys of one object have one placeholder: neither is lost."""
    n, made = 2, name
    while made in taken:
        made, n = f"{name} ({n})", n + 1
    return made


def _bad(message: str) -> HandoffError:
    return HandoffError(400, message)
