"""What stands in a value's place: ``[PROJECT_NAME-3f9a2c...]``, the same within a conversation.

    id  = HMAC-SHA256(key, (tenant, conversation, normalised value)), 64 bits
    tag = HMAC-SHA256(key, (word, id)), 32 bits

each under a domain of its own. Spellings of one value share an ``id``, two
values do not, and neither a counter nor a restart comes into it. Another conversation calls the
same value otherwise: who reads both cannot tell. The tag shows that a placeholder is a deployment's
own, word and all, so that it is not taken for a value at the next hop, and that no value hides in a
forged one.

The word before the dash is the own category that the value belongs to, else ``NUMBER`` for what is
mostly digits and ``TEXT`` for the rest.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator

from lcguard.canonical import canonical_hmac, check_key
from lcguard.value_search import Key, Range

_ID_DOMAIN, _TAG_DOMAIN = b"lcguard text placeholder\0", b"lcguard text placeholder tag\0"
_ID, _TAG = 16, 8
_FORM = re.compile(
    rf"\[([A-Z][A-Z0-9_]{{0,39}})-([0-9a-f]{{{_ID}}})([0-9a-f]{{{_TAG}}})\]", re.IGNORECASE
)


class Placeholders:
    """Those of one conversation."""

    def __init__(self, key: bytes, tenant: str, conversation: str) -> None:
        """``key``: the deployment key. Raises ``ValueError`` where it is too short."""
        self._key, self._where = check_key(key), [tenant, conversation]

    def of(self, value: str, category: str = "") -> str:
        """The placeholder of a value, in any spelling of it."""
        word, name = category.upper() or _kind(value), self.id_of(value)
        return f"[{word}-{name}{self._tag(word, name)}]"

    def id_of(self, value: str) -> str:
        """Names a value within the conversation."""
        key = Key.of(value)
        form = ["letters", key.bare] if key.bare else ["signs", key.signs]
        return canonical_hmac(self._key, _ID_DOMAIN, [*self._where, *form])[:_ID]

    def places(self, text: str) -> Iterator[tuple[Range, str]]:
        """Every placeholder of the deployment in a text, of any conversation, with its id."""
        for match in _FORM.finditer(text):
            word, name, tag = match[1].upper(), match[2].lower(), match[3].lower()
            if word.isascii() and hmac.compare_digest(tag, self._tag(word, name)):
                yield match.span(), name

    def _tag(self, word: str, name: str) -> str:
        return canonical_hmac(self._key, _TAG_DOMAIN, [word, name])[:_TAG]


def _kind(value: str) -> str:
    seen = [c for c in value if c.isalnum()]
    return "NUMBER" if 2 * sum(c.isdigit() for c in seen) > len(seen) else "TEXT"
