"""Requests against the guard contract, as its tests make them."""

from __future__ import annotations

from typing import Any

import pytest

from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_error import ContractError
from lcguard.server.gateway.contract_fields import Endpoint, Field

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions", "responses")
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completions": {"prompt": "hello"},
    "responses": {"input": "hello"},
}


SAMPLE: dict[type, Any] = {
    bool: True,
    int: 3,
    float: 0.5,
    str: "text",
    list: [{"role": "user"}],
    dict: {"a": 1},
}


OF_RESPONSES: dict[str, Any] = {
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "include": ["reasoning.encrypted_content"],
}
"""Lists that are looked into."""


def asks(endpoint: Endpoint, name: str, field: Field) -> Any:
    """A value of the right type that asks for something."""
    if name in MINIMAL[endpoint]:
        return MINIMAL[endpoint][name]
    if endpoint == "responses" and name in OF_RESPONSES:
        return OF_RESPONSES[name]
    return SAMPLE[min(field.types, key=lambda t: t.__name__)]


def refusal(
    body: Any, endpoint: Endpoint = "chat", consuming: bool = False, publishing: bool = False
) -> ContractError:
    with pytest.raises(ContractError) as refused:
        check(endpoint, body, consuming, publishing)
    assert refused.value.status == 400
    assert "\n" not in refused.value.message
    return refused.value
