"""Requests that are no requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from tests.server.drill import WAIT_S, Drill
from tests.server.proxy_client import (
    Answer,
)

JUNK = (
    b"",
    b"5",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"{",
    b'{"a":' * 5000,
    b"[" * 100000,
    b'"' * 999,
    b'{"prompt": NaN}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    *(
        b'{"model": "nano", "prompt": "a", "max_tokens": 2, ' + rest + b"}"
        for rest in (
            b'"top_k": 99999999999999999999999',
            b'"temperature": 1e999',
            b'"logit_bias": {"5": 1e999}',
            b'"seed": -99999999999999999999',
            b'"n": 99999999',
            b'"stop": ["\\ud800"]',
            b'"allowed_token_ids": [99999999999999999999]',
            b'"structured_outputs": {"regex": "(((("}',
            b'"lcguard": {"publish": {"audience": "\\ud800"}}',
            b'"lcguard": {"publish": 5}',
            b'"lcguard": {"consume": ["../../../../etc/passwd"]}',
            b'"kv_transfer_params": {}',
            b'"lcguard": {"publish": {"audience": "billing"}}, "prompt": [-1]',
            b'"lcguard": {"publish": {"audience": "billing", "ttl_s": 1e-300}}',
            b'"lcguard": {"publish": {"audience": "billing"}}, "max_tokens": 0',
            b'"lcguard": {"publish": {"audience": "billing"}}, "n": 3',
        )
    ),
)


def _takes_input(operation: Any) -> bool:
    return bool(operation.body or operation.path_parameters or operation.query)


def _send_many(
    operation: Any, mode: Any, n: int, drill: Drill, seen: Callable[[Answer], None]
) -> None:
    from requests.exceptions import InvalidHeader, InvalidURL

    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.setdefault("max_tokens", 1)  # some are answered after all
        try:
            got = case.call(
                base_url=drill.proxy.url,
                timeout=WAIT_S,
                headers={"Authorization": f"Bearer {drill.publisher.key}"},
            )
        except (InvalidHeader, InvalidURL):  # none that can be sent
            return
        headers = {k.lower(): v[0] for k, v in got.headers.items()}
        if got.status_code == 200 and (handle := headers.get("x-lcguard-handle")):
            drill.publisher.acknowledged.append(handle)
        seen(Answer(got.status_code, headers, got.content))

    # Schemathesis leaves the key out of every fourth, which says nothing of what is behind it
    generated = settings(
        max_examples=int(1.6 * n) + 1,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    generated(given(case=operation.as_strategy(generation_mode=mode))(send))()
