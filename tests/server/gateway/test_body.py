"""Bodies of requests: what is no JSON object that the engine could take is a 400 or 415 here."""

from __future__ import annotations

import pytest

from lcguard.server.errors import ProxyError
from lcguard.server.gateway.body import parse_object


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"seed": 9223372036854775808}', "9223372036854775808 does not fit 64 bits"),
        (b'{"prompt": [1, -9223372036854775809]}', "does not fit 64 bits"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", r"10{20}\.\.\. does not fit 64 bits"),
        (b'{"logit_bias": {"5": 1e999}}', "1e999 is not finite"),
        (b'{"temperature": NaN}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b"[1]", "the body is a list: send an object"),
        (b'{"a": 1', "not JSON"),
        (b"\xff", r"not UTF-8 \(byte 0\): send JSON in UTF-8"),
        (b'{"prompt": "Bj\xf6rn"}', r"not UTF-8 \(byte 14\)"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\\ud83d"}', "half a surrogate pair"),
        (b'{"messages": [{"content": "\\uDE00 x"}]}', "half a surrogate pair"),
    ],
)
def test_what_the_engine_could_not_take_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ProxyError, match=says) as refused:
        parse_object(raw, {})
    assert refused.value.status == 400


def test_the_widest_numbers_pass() -> None:
    body = b'{"seed": 9223372036854775807, "a": [-9223372036854775808, 1.5e308], "b": -0}'
    assert parse_object(body, {}) == {
        "seed": 2**63 - 1,
        "a": [-(2**63), 1.5e308],
        "b": 0,
    }


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
def test_only_plain_json_is_read(headers: dict[str, str]) -> None:
    with pytest.raises(ProxyError) as refused:
        parse_object(b"{}", headers)
    assert refused.value.status == 415


def test_whole_characters_pass_however_they_are_written() -> None:
    assert parse_object('{"a": "\\ud83d\\ude00 \\\\ud800 é"}'.encode(), {}) == {"a": "😀 \\ud800 é"}
