"""What a request asks for: ``kv_transfer_params={"lcguard": {...}}``, unknown keys refused.

    {"publish": {"source": "intake", "audience": "billing"}}
    {"consume": {"agent": "billing", "segments": [{"handle": "...", "grant": "..."}]}}

Both together publish what an agent made of what it consumed. ``also`` names further audiences of
the same publish (``lcguard.handoff.audiences``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from lcguard.canonical import canonical_json
from lcguard.categories import CATEGORIES, in_order, own_names
from lcguard.custom_categories import CategoryName
from lcguard.handoff.channel import check_channel
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.names import EdgeName, HandleName, QualifiedName, split_tenant
from lcguard.handoff.policy import TOLD, Edge, Policy, PolicyError, cannot_find
from lcguard.manifest import Digest
from lcguard.rule import Rule

PARAM = "lcguard"
SCANNED = "scanned"
"""Key of an answer that stored nothing and says what the guard found in the prompt."""
MAX_AUDIENCES = 16
"""Of one publish: each is one more segment in the store."""
F = TypeVar("F", bound=BaseModel)
NewHandle = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{32,128}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AlsoFor(_Model):
    """A further audience of a publish."""

    audience: QualifiedName
    handle: NewHandle | None = None
    """As that of the publish."""


class EnginePublish(_Model):
    """Guard this prompt's KV and keep it for ``audience``."""

    source: QualifiedName
    audience: QualifiedName
    also: Annotated[tuple[AlsoFor, ...], Field(max_length=MAX_AUDIENCES - 1)] = ()
    """Further audiences: the same guarded KV, each under a handle of its own. All of them get
    theirs or none does."""
    forbid: tuple[CategoryName, ...] | None = None
    """Categories to hide beyond those of the policy: a request can tighten, never loosen."""
    ttl_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    """Seconds to live; at most the policy's."""
    spans: tuple[tuple[int, int], ...] | None = None
    """Token ranges ``[start, end)`` of the secrets in the prompt as sent, for guard ``redact``."""
    tokens: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """``tokens_digest`` of the prompt that the spans were counted on: another one is refused."""
    handle: NewHandle | None = None
    """The name to store it under, never used before; drawn by the engine if absent. It is no
    permission, see ``lcguard.handoff.grants``."""
    scan: Annotated[str, StringConstraints(max_length=100)] | None = None
    """For guards that find secrets themselves: the engine's word that it looked for them in this
    prompt, and found those at ``spans``. Put in by ``lcguard.vllm``, never by a client; without it
    the engine looks, and stores nothing."""
    looked_for: dict[CategoryName, Digest] | None = None
    """The policy's own categories that were looked for in this prompt, each with the digest of its
    definition: put in by the proxy and by ``GuardedLLM``. Without it an edge that forbids one
    takes no publish."""
    told: tuple[tuple[int, int], ...] | None = None
    """For guards that find secrets themselves: token ranges to hide beside those, which belong to
    the categories of ``looked_for``."""
    guard: Literal["redact"] | None = None
    """``redact`` in place of the edge's guard, where the policy says ``on_leak: redact``."""

    @property
    def edge_name(self) -> EdgeName:
        return EdgeName(self.source, self.audience)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        every = self.each()
        audiences = [one.audience for one in every]
        handles = [one.handle for one in every if one.handle is not None]
        for named in (audiences, handles):
            if repeated := [name for i, name in enumerate(named) if name in named[:i]]:
                raise ValueError(f"also names {repeated[0]!r} again: name each audience once")
        return self

    def each(self) -> tuple[EnginePublish, ...]:
        """One for each audience, as if it were the only one."""
        first = self.model_copy(update={"also": ()})
        others = ({"audience": one.audience, "handle": one.handle} for one in self.also)
        return (first, *(first.model_copy(update=other) for other in others))

    def named(self, new: Callable[[], str]) -> EnginePublish:
        """With a handle for each audience; ``new`` draws those that are missing."""
        also = tuple(one.model_copy(update={"handle": one.handle or new()}) for one in self.also)
        return self.model_copy(update={"handle": self.handle or new(), "also": also})


class Grant(_Model):
    handle: HandleName
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

    publish: EnginePublish | None = None
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
        return canonical_json(signed)


def tokens_digest(ids: Sequence[int]) -> str:
    """SHA-256 of a prompt's tokens."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def parse_handoff(params: Mapping[str, Any] | None) -> Handoff | None:
    """The handoff that a request asks the engine for; None for an ordinary request.

    Raises ``HandoffError`` (400) naming the key at fault.
    """
    if not isinstance(params, Mapping) or PARAM not in params:
        return None
    value = params[PARAM]
    # as JSON would have come: tuples and lists, nothing coerced
    return parse_field(Handoff, _tuples(value) if isinstance(value, Mapping) else value)


def parse_field(form: type[F], value: object) -> F:
    """A value of the field ``lcguard`` in the engine's form, or in that of the proxy's clients.

    Raises ``HandoffError`` (400) naming the key at fault.
    """
    if not isinstance(value, Mapping):
        raise _bad(PARAM, f"is a {type(value).__name__}: give publish or consume")
    try:
        found = form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # which form of a value it was held against is no key: "(several)"
        where = [str(key) for key in first["loc"] if not str(key).startswith("(")]
        raise _bad(".".join([PARAM, *where]), first["msg"]) from None
    parts = [name for name in ("publish", "consume", "text") if name in form.model_fields]
    if not any(getattr(found, part) is not None for part in parts):
        raise _bad(PARAM, f"is empty: give {' or '.join(parts)}")
    return found


def edge_of(policy: Policy, publish: EnginePublish) -> Edge:
    """The policy's rule for this hop, tightened by what the request hides beyond it.

    Raises ``HandoffError``: 403 for an edge that takes text, 400 for a hop between tenants, for a
    guard that the rule does not let a request choose, and for a category that nobody knows, or that
    the edge's guard cannot find.
    """
    try:
        edge = policy.for_edge(publish.source, publish.audience)
    except PolicyError as error:
        raise HandoffError(400, str(error)) from None
    check_channel(edge, "kv")
    if publish.guard not in (None, edge.guard) and edge.on_leak != publish.guard:
        raise HandoffError(
            400,
            f"guard {publish.guard!r} is not this edge's: leave it out, or let the policy say "
            f"on_leak: {publish.guard}",
        )
    also = publish.forbid or ()
    known = (*CATEGORIES, *policy.custom_of(split_tenant(publish.source)[0]))
    if unknown := [c for c in also if c not in known]:
        raise _bad(f"{PARAM}.publish.forbid", f"{unknown[0]!r}: use {', '.join(known)}")
    rule = Rule(in_order((*edge.forbid, *also)), tuple(c for c in edge.derive if c not in also))
    ttl_s = min(edge.ttl_s, publish.ttl_s or edge.ttl_s)
    tight = edge.under(rule, ttl_s=ttl_s, guard=publish.guard or edge.guard)
    check_findable(tight)
    return tight


def check_findable(edge: Edge) -> None:
    """Raises ``HandoffError`` (400) for an own category that nobody defines, or that the edge's
    guard cannot find."""
    own = own_names(edge.forbid)
    if lost := [c for c in own if c not in edge.custom]:
        # it travelled with what was consumed, and the policy no longer has it
        raise HandoffError(
            400,
            f"{', '.join(lost)} is forbidden on {edge.name.in_words} and no category of the "
            "policy: nobody can find it; define it again, or publish without consuming",
        )
    if own and edge.guard not in TOLD:
        raise HandoffError(400, f"{edge.name.in_words}: {cannot_find(edge.guard, own)}")


def _bad(param: str, message: str) -> HandoffError:
    return HandoffError(400, f"{param}: {message}", param)


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: a strict model takes nothing else for them."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    return value
