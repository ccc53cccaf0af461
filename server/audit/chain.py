"""The chain of HMACs that makes an altered audit row visible.

    mac_i = HMAC-SHA256(k, domain || mac_{i-1} || canonical JSON of row i),    i = 1, 2, ...

with mac_0 = 64 zeros and k derived from the deployment key. The *head*, HMAC over (count, last
mac), shows that rows are gone from the end. Whoever can write the file but lacks the key can only
put the whole of it back to an older state.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lcguard.canonical import canonical_json, check_key

_KEY_DOMAIN = b"lcguard audit key\0"
_ROW_DOMAIN = b"lcguard audit row\0"
_HEAD_DOMAIN = b"lcguard audit head\0"
_MARK = re.compile(r"(0|[1-9][0-9]{0,17}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Mark:
    """How far the trail goes; written ``COUNT:MAC``, for the operator to keep elsewhere."""

    count: int = 0
    mac: str = "0" * 64

    def __str__(self) -> str:
        return f"{self.count}:{self.mac}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """Raises ``ValueError`` for anything that ``str`` of a mark does not give."""
        match = _MARK.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"head {text[:80]!r} is not COUNT:MAC: give what `lcguard audit verify` printed"
            )
        return cls(int(match[1]), match[2])


class Chain:
    """The HMACs of one deployment's trail."""

    def __init__(self, key: bytes) -> None:
        """``key``: the deployment key. Raises ``ValueError`` where it is too short."""
        self._key = hmac.digest(check_key(key), _KEY_DOMAIN, "sha256")

    def row(self, before: str, row: Mapping[str, object]) -> str:
        """The mac of ``row``, which names its ``seq``, after the row with mac ``before``.

        Raises ``ValueError`` or ``TypeError`` for a row with values that the trail never holds.
        """
        return self._mac(_ROW_DOMAIN + before.encode("ascii") + canonical_json(dict(row)))

    def head(self, mark: Mark) -> str:
        """The HMAC of the head row."""
        return self._mac(_HEAD_DOMAIN + canonical_json([mark.count, mark.mac]))

    def is_head(self, count: object, mac: object, signature: object) -> bool:
        """Whether a head row with these values is ours; they may be of any type."""
        if type(count) is not int or not isinstance(mac, str):
            return False
        return same(signature, self.head(Mark(count, mac)))

    def _mac(self, message: bytes) -> str:
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


def same(first: object, second: str) -> bool:
    """Compares HMACs in constant time; whatever is no text differs."""
    return isinstance(first, str) and hmac.compare_digest(
        first.encode("utf-8", "surrogateescape"), second.encode("ascii")
    )
