"""Requests against the guard contract, as its tests make them."""

from __future__ import annotations

from typing import Any

import pytest

from lcguard.server.gateway.contract import ContractError, check
from lcguard.server.gateway.contract_fields import (
    Endpoint,
    Field,
)

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completions": {"prompt": "hello"},
}


SAMPLE: dict[type, Any] = {
    bool: True,
    int: 3,
    float: 0.5,
    str: "text",
    list: [{"role": "user"}],
    dict: {"a": 1},
}


def asks(endpoint: Endpoint, name: str, field: Field) -> Any:
    """A value of the right type that asks for something."""
    if name in MINIMAL[endpoint]:
        return MINIMAL[endpoint][name]
    return SAMPLE[min(field.types, key=lambda t: t.__name__)]


def refusal(
    body: Any, endpoint: Endpoint = "chat", consuming: bool = False, publishing: bool = False
) -> ContractError:
    with pytest.raises(ContractError) as refused:
        check(endpoint, body, consuming, publishing)
    assert refused.value.status == 400
    assert "\n" not in refused.value.message
    return refused.value
