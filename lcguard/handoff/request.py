"""What a request asks for: ``kv_transfer_params={"lcguard": {...}}``, unknown keys refused.

    {"publish": {"source": "intake", "audience": "billing"}}
    {"consume": {"agent": "billing", "segments": [{"handle": "...", "grant": "..."}]}}

Both together publish what an agent made of what it consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from lcguard.categories import Category
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.names import QualifiedName
from lcguard.rope import canonical

PARAM = "lcguard"
SCANNED = "scanned"
"""Key of an answer that stored nothing and says what the guard found in the prompt."""
Handle = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{16,128}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Publish(_Model):
    """Guard this prompt's KV and keep it for ``audience``."""

    source: QualifiedName
    audience: QualifiedName
    forbid: tuple[Category, ...] | None = None
    """Categories to hide beyond those of the policy: a request can tighten, never loosen."""
    ttl_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    """Seconds to live; at most the policy's."""
    spans: tuple[tuple[int, int], ...] | None = None
    """Token ranges ``[start, end)`` of the secrets in the prompt as sent, for guard ``redact``."""
    tokens: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """``tokens_digest`` of the prompt that the spans were counted on: another one is refused."""
    handle: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{32,128}$")] | None = None
    """The name to store it under, never used before; drawn by the engine if absent. It is no
    permission, see ``lcguard.handoff.grants``."""
    scan: Annotated[str, StringConstraints(max_length=100)] | None = None
    """For guards that find secrets themselves: the engine's word that it looked for them in this
    prompt, and found those at ``spans``. Put in by ``lcguard.vllm``, never by a client; without it
    the engine looks, and stores nothing."""
    guard: Literal["redact"] | None = None
    """``redact`` in place of the edge's guard, where the policy says ``on_leak: redact``."""


class Grant(_Model):
    handle: Handle
    grant: Annotated[str, StringConstraints(max_length=100)]


class Consume(_Model):
    """Put segments before this prompt, one behind the other."""

    agent: QualifiedName
    """Who consumes: must be the audience of every grant."""
    segments: Annotated[tuple[Grant, ...], Field(min_length=1, max_length=64)]
    placed: bool = False
    """True where the prompt already starts with the placeholder tokens."""


class Handoff(_Model):
    """The value of ``lcguard`` in ``kv_transfer_params``."""

    publish: Publish | None = None
    consume: Consume | None = None
    order: Annotated[str, StringConstraints(max_length=100)] | None = None
    """The proxy's signature, for engines with ``proxy_only``."""

    def text(self) -> bytes:
        """What the proxy signs: canonical JSON of all but the signature, and but for what the
        engine adds itself once it has looked for secrets."""
        signed = self.model_dump(mode="json", exclude={"order"})
        if self.publish is not None:
            if self.publish.scan is not None:
                signed["publish"]["spans"] = None
            del signed["publish"]["scan"]
        return canonical(signed)


def tokens_digest(ids: Sequence[int]) -> str:
    """SHA-256 of a prompt's tokens."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def parse_handoff(params: Mapping[str, Any] | None) -> Handoff | None:
    """The handoff that a request asks for; None for an ordinary request.

    Raises ``HandoffError`` (400) naming the key at fault.
    """
    if not isinstance(params, Mapping) or PARAM not in params:
        return None
    value = params[PARAM]
    if not isinstance(value, Mapping):
        raise HandoffError(400, f"{PARAM} is {type(value).__name__}: give publish or consume")
    try:
        # As JSON would have come: tuples and lists, nothing coerced.
        handoff = Handoff.model_validate(_tuples(dict(value)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HandoffError(400, f"{PARAM}.{where}: {first['msg']}") from None
    if handoff.publish is None and handoff.consume is None:
        raise HandoffError(400, f"{PARAM} is empty: give publish or consume")
    return handoff


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: a strict model takes nothing else for them."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    return value
