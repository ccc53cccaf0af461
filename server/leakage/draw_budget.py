"""How many draws of noise an audience gets of one record: who has many averages the noise away.

A draw is named in the manifest (``lcguard.vllm.draws``): the same content again, and a conversation
that grows, are no further one. A *record* is what the publisher names as one (``record``); where it
names none, a text belongs to the record of an earlier one on its edge if one of both says all that
the other does and at most ``MORE_WORDS`` words beyond: a space, a full stop, another order or a
sentence more makes no new record, another name or number does. Texts that say the same in other
words are not recognised: name the record.

Functions on a connection, like those of ``lcguard.server.leakage.ledger``. Words are kept as hashes
under the deployment's key, and names of records too: no text lies in the file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lcguard.server.database.connection import Connection
from lcguard.server.leakage.ledger import KEEP_RECEIVED_S, LedgerError, find

MORE_WORDS = 8
KEEP_TEXTS = 1024
"""Texts of an edge that new ones are held against."""
_WORD = re.compile(r"\w+")
_MOST_WORDS = 1 << 15


class DrawsSpent(LedgerError):
    """The audience would receive too many draws of one record."""

    def __init__(self, audience: str, source: str, max_draws: int, frees_at_s: float) -> None:
        when = datetime.fromtimestamp(frees_at_s, UTC).isoformat(timespec="seconds")
        super().__init__(
            f"audience {audience!r} may receive {max_draws} draws of one record of source "
            f"{source!r}: publish the very text of before, which is no further draw, name another "
            f"record in lcguard.publish.record if it is one, or raise max_draws of the policy; "
            f"there is room again at {when}"
        )
        self.frees_at_s = frees_at_s
        """Unix time at which the oldest receipt is forgotten."""


@dataclass(frozen=True)
class Text:
    """What is known of a published text."""

    record: str = ""
    """The record that its publisher named, as an HMAC; empty where it named none."""
    words: frozenset[int] = frozenset()
    """Distinct words, as 64-bit keyed hashes."""


def text_of(key: bytes, record: str | None, body: Mapping[str, Any]) -> Text:
    """Of a request's body; ``record`` as its publisher named it."""
    if record is not None:
        return Text(hmac.new(key, b"lcguard record\0" + record.encode(), "sha256").hexdigest()[:32])
    words: set[str] = set()
    for name in ("messages", "prompt", "instructions", "input", "tools", "documents"):
        for string in _strings(body.get(name)):
            words.update(_WORD.findall(unicodedata.normalize("NFKC", string).casefold()))
    secret = hashlib.sha256(b"lcguard words\0" + key).digest()
    hashes = sorted(
        int.from_bytes(hashlib.blake2b(w.encode(), key=secret, digest_size=8).digest())
        for w in words
    )
    return Text("", frozenset(hashes[:_MOST_WORDS]))


def record_of(
    connection: Connection,
    tenant: str,
    source: str,
    audience: str,
    text: Text | None,
    now_s: float,
) -> str:
    """The record that a published text belongs to; the text is remembered. None: one of its own."""
    if text is None:
        return secrets.token_hex(16)
    if text.record:
        return text.record
    edge = (tenant, source, audience)
    rows = connection.execute(
        "SELECT record, words FROM texts WHERE tenant = ? AND source = ? AND audience = ? "
        "AND n_words BETWEEN ? AND ? AND at_s > ? ORDER BY at_s DESC",
        (
            *edge,
            len(text.words) - MORE_WORDS,
            len(text.words) + MORE_WORDS,
            now_s - KEEP_RECEIVED_S,
        ),
    )
    record = next(
        (record for record, packed in rows if _nested(text.words, _unpacked(packed))),
        secrets.token_hex(16),
    )
    connection.execute(
        "INSERT INTO texts (tenant, source, audience, n_words, at_s, record, words) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*edge, len(text.words), now_s, record, array("Q", sorted(text.words)).tobytes()),
    )
    return record


def reserve_draw(
    connection: Connection,
    tenant: str,
    audience: str,
    handle: str,
    max_draws: int | None,
    now_s: float,
) -> None:
    """Books that ``audience`` receives a segment's draw, before it does.

    Nothing is booked of a segment without noise, nor of the audience's own text.

    Raises ``DrawsSpent``.
    """
    segment = find(connection, handle)
    if segment is None or not segment.draw or segment.source == audience:
        return
    place = (tenant, audience, segment.source, segment.record)
    got = dict(
        connection.execute(
            "SELECT draw, at_s FROM draws WHERE tenant = ? AND audience = ? AND source = ? "
            "AND record = ? AND at_s > ?",
            (*place, now_s - KEEP_RECEIVED_S),
        ).fetchall()
    )
    if segment.draw in got:
        return
    if max_draws is not None and len(got) >= max_draws:
        oldest = sorted(got.values())[len(got) - max_draws]
        raise DrawsSpent(audience, segment.source, max_draws, oldest + KEEP_RECEIVED_S)
    connection.execute(
        "INSERT INTO draws (tenant, audience, source, record, draw, at_s) "
        "VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (tenant, audience, source, record, draw) DO UPDATE SET at_s = EXCLUDED.at_s",
        (*place, segment.draw, now_s),
    )


def sweep_draws(connection: Connection, now_s: float) -> None:
    """Forgets what is too old, and the oldest texts of an edge with too many."""
    before = (now_s - KEEP_RECEIVED_S,)
    connection.execute("DELETE FROM draws WHERE at_s <= ?", before)
    connection.execute("DELETE FROM texts WHERE at_s <= ?", before)
    connection.execute(
        "WITH cut AS (SELECT * FROM (SELECT tenant, source, audience, at_s, record, row_number() "
        "OVER (PARTITION BY tenant, source, audience ORDER BY at_s DESC, record DESC) AS n "
        "FROM texts) AS aged WHERE n = ?) DELETE FROM texts WHERE EXISTS (SELECT 1 FROM cut WHERE "
        "cut.tenant = texts.tenant AND cut.source = texts.source AND "
        "cut.audience = texts.audience AND (texts.at_s, texts.record) <= (cut.at_s, cut.record))",
        (KEEP_TEXTS + 1,),
    )


def _nested(a: frozenset[int], b: frozenset[int]) -> bool:
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    return len(large) - len(small) <= MORE_WORDS and small <= large


def _unpacked(packed: bytes) -> frozenset[int]:
    words = array("Q")
    words.frombytes(packed)
    return frozenset(words)


def _strings(value: object) -> Iterator[str]:
    """All text within JSON, and numbers: a prompt may be tokens."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float):
        yield str(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
