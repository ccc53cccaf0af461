"""The page of the options: printed from the settings, and none of them unexplained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from lcguard.commands.config_reference import kind_of, page, sections
from lcguard.config import field_paths
from lcguard.server.settings import ServerSettings
from tests.paths import ROOT

GROUPS = {f.name for f in fields(ServerSettings) if hasattr(f.default_factory, "__annotations__")}


def test_the_documents_page_is_the_settings() -> None:
    shown = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert shown == page(), "lcguard config reference > docs/reference/configuration.md"


def test_every_option_is_there_and_explained() -> None:
    options = [option for _, _, rows in sections() for option in rows]
    assert GROUPS == {"upstream", "limits", "canaries", "engine"}
    assert {o.name for o in options} == set(field_paths(ServerSettings)) - GROUPS
    for option in options:
        assert option.what.endswith("."), option.name


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "integer, at least 1"),
        ({"type": "string", "format": "path"}, "path"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer or null"),
        ({"enum": ["agent", "tenant"], "type": "string"}, "`agent` or `tenant`"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "name: text"),
    ],
)
def test_types_in_words(schema: dict[str, Any], words: str) -> None:
    assert kind_of(schema) == words
