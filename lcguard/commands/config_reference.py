"""The page of all options of ``server.yaml``, printed by ``lcguard config reference``.

Names, types and bounds are those that a file is checked against, texts those under each field of
``lcguard.server.settings``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, create_model

from lcguard.server.settings import ServerSettings

_HEAD = """\
# Configuration

Every option of `server.yaml` in the state folder; each can be given as `--set NAME=VALUE` too. \
`lcguard config show` prints the values in force, `lcguard config check` checks them. Unknown \
names are refused. This page is printed by `lcguard config reference`.
"""
_WORDS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Option:
    """One line of a table."""

    name: str
    """Dotted."""
    kind: str
    default: str
    what: str


def page() -> str:
    """The whole page, in Markdown."""
    return _HEAD + "".join(_section(title, about, rows) for title, about, rows in sections())


def sections() -> Iterator[tuple[str, str, list[Option]]]:
    """Heading, what it is about, and its options: those of the server itself, then each group."""
    # Standard dataclasses take their configuration from the model around them (lcguard.config).
    wrapper = create_model(
        "Wrapper",
        __config__=ConfigDict(use_attribute_docstrings=True),
        settings=(ServerSettings, ...),
    )
    groups = wrapper.model_json_schema()["$defs"]
    defaults = TypeAdapter(ServerSettings).dump_python(ServerSettings(), mode="json")
    own = groups[ServerSettings.__name__]
    inner = {name: _group(found) for name, found in own["properties"].items() if _group(found)}
    plain = {k: v for k, v in own["properties"].items() if k not in inner}
    yield "The server", own["description"], list(_options("", plain, defaults))
    for name, group in inner.items():
        found = groups[group]
        rows = _options(f"{name}.", found["properties"], defaults[name])
        yield f"`{name}`", found["description"], list(rows)


def _group(found: dict[str, Any]) -> str:
    return str(found.get("$ref", "")).rpartition("/")[2]


def _options(prefix: str, properties: dict[str, Any], defaults: dict[str, Any]) -> Iterator[Option]:
    for name, found in properties.items():
        value = defaults[name]
        shown = '""' if value == "" else value if isinstance(value, str) else json.dumps(value)
        text = " ".join(found.get("description", "").split()).replace("``", "`")
        yield Option(prefix + name, kind_of(found), f"`{shown}`", text)


def kind_of(found: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in found:
        return " or ".join(kind_of(one) for one in found["anyOf"])
    if "enum" in found:
        return " or ".join(f"`{value}`" for value in found["enum"])
    if found["type"] == "array":
        return f"list of {kind_of(found['items'])}"
    if found["type"] == "object":
        return f"name: {kind_of(found['additionalProperties'])}"
    if found.get("format") == "path":
        return "path"
    return _WORDS[found["type"]] + _bounds(found)


def _bounds(found: dict[str, Any]) -> str:
    told = [
        f"{word} {found[name]:g}"
        for name, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in found
    ]
    return "".join(f", {text}" for text in told)


def _section(title: str, about: str, rows: list[Option]) -> str:
    lines = [f"| `{r.name}` | {r.kind} | {r.default} | {_cell(r.what)} |" for r in rows]
    head = ["| option | type | default | what it does |", "|---|---|---|---|"]
    told = " ".join(about.split()).replace("``", "`")
    return "\n".join([f"\n## {title}\n\n{told}\n", *head, *lines]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
