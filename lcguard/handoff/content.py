"""What a segment is made of, as the name of its noise: equal content, equal name.

The name is secret, because whoever has it could try texts until one has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lcguard.canonical import canonical_hmac
from lcguard.manifest import Manifest

Chain = list[bytes]
"""A digest of a content and its guard up to each token; secret, because its start is."""


@dataclass(frozen=True)
class Content:
    """What a segment is made of, but for its guard: whoever has it knows the text."""

    context: bytes
    """HMAC of edge, rule, model and of what the tokens are read on top of."""
    tokens: tuple[int, ...]


def content_of(
    key: bytes,
    edge: Sequence[object],
    model: Sequence[str],
    consumed: Sequence[Manifest],
    tokens: Sequence[int],
) -> Content:
    """``edge``: names and rule; ``model``: digests of weights and architecture."""
    below = [[m.tensor_digests.keys, m.tensor_digests.values] for m in consumed]
    return Content(draw_mac(key, "content", list(edge), list(model), below), tuple(tokens))


def chain_of(content: Content, guard_digest: str) -> Chain:
    """Of a content with tokens."""
    state = hashlib.blake2b(guard_digest.encode(), key=content.context, digest_size=32).digest()
    out = []
    for token in content.tokens:
        step = hashlib.blake2b(token.to_bytes(8, "little"), key=state, digest_size=32)
        state = step.digest()
        out.append(state)
    return out


def draw_mac(key: bytes, *parts: object) -> bytes:
    """HMAC of whatever noise is drawn from, or named by."""
    return bytes.fromhex(canonical_hmac(key, b"lcguard draw\0", list(parts)))
