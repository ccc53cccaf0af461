"""The one field that makes a request a handoff: ``lcguard``, or the headers that stand for it.

    {"publish": {"audience": "billing"}}
    {"publish": {"audience": ["billing", "scheduling"]}}
    {"consume": ["HANDLE", ...]}

    {"text": {"source": "intake"}}, {"text": {"audience": "billing"}}

``publish`` and ``consume`` together publish what an agent made of what it consumed. Who publishes,
consumes or hands over text is never in the request: the API key says it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from lcguard.custom_categories import CategoryName
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.names import HandleName, KeyName
from lcguard.handoff.request import MAX_AUDIENCES, PARAM, parse_field
from lcguard.server.errors import ProxyError

FIELD = PARAM
PUBLISH_HEADER = "x-lcguard-publish"
CONSUME_HEADER = "x-lcguard-consume"
_ANSWER_ID = re.compile(r"^((chat)?cmpl-|resp_)(?=.{32})")
"""What vLLM puts before a publish's handle to name its answer."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Secrets = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1, max_length=4096)], ...] | None,
    Field(max_length=1024),
]
Conversation = Annotated[str, StringConstraints(max_length=200)]


def _form(audience: Any) -> str:
    return "(several)" if isinstance(audience, list | tuple) else "(one)"


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"names {repeated[0]!r} twice: give each once")
    return names


Several = Annotated[
    tuple[KeyName, ...], Field(min_length=1, max_length=MAX_AUDIENCES), AfterValidator(_once)
]


class Publish(_Model):
    """Guard this prompt's KV and keep it for ``audience``."""

    audience: Annotated[
        Annotated[KeyName, Tag("(one)")] | Annotated[Several, Tag("(several)")],
        Discriminator(_form),
    ]
    """Agent of the same tenant, or several: one guard pass under the rules of all their edges, one
    draw of noise, and a handle for each. The answer's ``published`` is a list then. Where an edge
    refuses, nobody gets one."""
    forbid: tuple[CategoryName, ...] = ()
    """Categories to hide beyond those of the policy: a request tightens, never loosens."""
    ttl_s: Annotated[float, Field(ge=1, le=31_536_000)] | None = None
    """Seconds to live; at most the policy's."""
    secrets: Secrets = None
    """For edges with guard ``redact``: texts in the prompt to overwrite, wherever they occur."""
    record: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """The record or conversation that this is of: an audience gets ``max_draws`` draws of one.
    Where it is not named, texts that are nearly the same count as one."""
    source: KeyName | None = None
    """For canaries alone: whom they stand in for."""
    tenant: KeyName | None = None
    """For canaries alone."""

    @property
    def several(self) -> bool:
        """Whether audiences were given as a list, be it of one."""
        return not isinstance(self.audience, str)

    @property
    def audiences(self) -> tuple[str, ...]:
        return (self.audience,) if isinstance(self.audience, str) else self.audience


class TextField(_Model):
    """What is handed over as text, on an edge with ``channel: text``."""

    source: KeyName | None = None
    """The request's text came from this agent: guarded before the caller's model reads it."""
    audience: KeyName | None = None
    """The answer goes to this agent: guarded before it leaves."""
    secrets: Secrets = None
    """Values to hide wherever they stand, ``[]`` for none."""
    conversation: Conversation = ""
    """Within it a value keeps its placeholder."""

    @model_validator(mode="after")
    def _a_hop(self) -> Self:
        if self.source is None and self.audience is None:
            raise ValueError("give source, or audience, or both")
        return self


class HandoffField(_Model):
    """The value of ``lcguard``."""

    text: TextField | None = None
    """Without ``publish``: text and KV of one request are not handed over at once."""

    publish: Publish | None = None
    consume: Annotated[tuple[HandleName, ...], Field(min_length=1, max_length=64)] | None = None
    """Handles, or ids of the answers that published, in the order in which the segments stand
    before the prompt."""

    @field_validator("consume")
    @classmethod
    def _handles(cls, named: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if named is None else tuple(_ANSWER_ID.sub("", name) for name in named)


def read_handoff(value: Any, headers: Mapping[str, str]) -> HandoffField | None:
    """The handoff of a request; None for an ordinary one.

    Args:
        value: of the field ``lcguard``; None where the body has none.
        headers: lower-case names.

    Raises:
        ProxyError: 400 naming the key at fault.
    """
    audience, handles = headers.get(PUBLISH_HEADER), headers.get(CONSUME_HEADER)
    if audience is not None or handles is not None:
        if value is not None:
            raise _bad(FIELD, f"give the field or the {PUBLISH_HEADER} headers, not both")
        value = {}
        if audience is not None:
            names = [name.strip() for name in audience.split(",")]
            value["publish"] = {"audience": names if len(names) > 1 else names[0]}
        if handles is not None:
            value["consume"] = [h.strip() for h in handles.split(",")]
    if value is None:
        return None
    try:
        found = parse_field(HandoffField, value)
    except HandoffError as error:
        raise ProxyError(400, str(error), code="bad_handoff", param=error.param) from None
    if found.text is not None and found.publish is not None:
        raise _bad(f"{FIELD}.text", "is not for a request that publishes KV: send it apart")
    if found.consume is not None and len(set(found.consume)) < len(found.consume):
        raise _bad(f"{FIELD}.consume", "names a handle twice: give each once")
    return found


def _bad(param: str, message: str) -> ProxyError:
    return ProxyError(400, f"{param}: {message}", code="bad_handoff", param=param)
