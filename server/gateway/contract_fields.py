"""Reads the guard contract's tables from ``contract.yaml``, which says what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Endpoint = Literal["chat", "completions", "responses"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
}
GROUPS: dict[str, tuple[Endpoint, ...]] = {"all": ENDPOINTS, "both": ("chat", "completions")}
"""What several endpoints have in common."""

_TYPES: dict[str, set[type]] = {
    "boolean": {bool},
    "integer": {int},
    "number": {int, float},
    "string": {str},
    "list": {list},
    "object": {dict},
    "null": set(),
}


@dataclass(frozen=True)
class Field:
    """One field of a request."""

    kind: str
    """Its class, of ``MEANING``."""
    types: frozenset[type]
    """Of its JSON value, exactly."""
    why: str
    fix: str = ""
    """What a refused client does instead."""
    neutral: Any = None
    """The value that asks for nothing, as does null: allowed even where the field is refused."""


def _types(words: str) -> frozenset[type]:
    return frozenset[type]().union(*(_TYPES[word] for word in words.split(" or ")))


def _fields(groups: list[dict[str, Any]]) -> dict[Endpoint, dict[str, Field]]:
    out: dict[Endpoint, dict[str, Field]] = {endpoint: {} for endpoint in ENDPOINTS}
    for group in groups:
        kind, why, neutral = group["class"], group["why"], group.get("neutral", {})
        fix = group.get("fix", "leave it out" if kind.startswith("refused") else "")
        for endpoint in ENDPOINTS:
            shared = [name for name, of in GROUPS.items() if endpoint in of]
            found = {n: w for key in (*shared, endpoint) for n, w in group.get(key, {}).items()}
            for name, words in found.items():
                assert kind in MEANING, kind
                assert name not in out[endpoint], name
                out[endpoint][name] = Field(kind, _types(words), why, fix, neutral.get(name))
    return out


def _by_name(names_by_class: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: kind for kind, names in names_by_class.items() for name in names}


_CONTRACT = yaml.safe_load(Path(__file__).with_name("contract.yaml").read_text(encoding="utf-8"))
MEANING: dict[str, str] = _CONTRACT["classes"]
ANSWER_MEANING: dict[str, str] = _CONTRACT["answer_classes"]
FIELDS = _fields(_CONTRACT["request"])
ANSWER, CHOICE, USAGE = (_by_name(_CONTRACT[part]) for part in ("answer", "choices", "usage"))
"""The class, of ``ANSWER_MEANING``, of each field of an answer and of what lies in it."""
MESSAGE = {name: _types(words) for name, words in _CONTRACT["messages"].items()}
UNSENT = frozenset(_CONTRACT["unsent"])
"""Of each of ``messages``: no part of the prompt."""
ITEMS = {
    kind: {name: _types(words) for name, words in fields.items()}
    for kind, fields in _CONTRACT["items"].items()
}
"""Of each kind of item in a response's ``input``."""
REQUIRED: dict[str, list[str]] = _CONTRACT["required"]
RESPONSE, OUTPUT, CONTENT, RESPONSE_USAGE, EVENTS = (
    _by_name(_CONTRACT[part])
    for part in ("response", "output", "content", "response_usage", "events")
)
"""As ``ANSWER``, of a response and of a stream's events."""
EMPTY: dict[str, Any] = _CONTRACT["empty"]
RENDERER_OPTIONS = frozenset(_CONTRACT["renderer_options"])
