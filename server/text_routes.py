"""Text handed over outside of an answer: guarded for an audience, and restored for whom the policy
entitles."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Self, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lcguard.handoff.names import KeyName
from lcguard.server.access.roles import Caller, Running
from lcguard.server.audit.trail import Event
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.body import ClientGone, parse_object, read_body
from lcguard.server.gateway.handoff_field import Conversation, Secrets
from lcguard.server.state import Proxy
from lcguard.text.guard import Guarded, TextGuard

router = APIRouter()
_BYTES_PER_TOKEN = 4
_FORMS = ("text", "messages", "json")


class _Value(BaseModel):
    """One of ``text``, ``messages`` and ``json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    conversation: Conversation = ""
    """Within it a value keeps its placeholder."""
    text: str | None = None
    messages: list[Any] | None = None
    """As OpenAI's chat or Responses API has them."""
    json_: Annotated[Any, Field(alias="json")] = None
    """Any other value but null."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.given) != 1:
            raise ValueError("give one of text, messages and json")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """By its name."""
        values = zip(_FORMS, (self.text, self.messages, self.json_), strict=True)
        return {name: value for name, value in values if value is not None}


class TextRequest(_Value):
    """What the caller hands to ``audience``."""

    audience: KeyName
    secrets: Secrets = None
    """Values to hide wherever they stand, ``[]`` for none."""


class RestoreRequest(_Value):
    """What the caller wants its values back in."""


R = TypeVar("R", bound=BaseModel)


def _body(form: type[BaseModel]) -> dict[str, Any]:
    schema = form.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/lcguard/v1/text", tags=["lcguard"], openapi_extra=_body(TextRequest))
async def guard_text(request: Request, proxy: Running, who: Caller) -> dict[str, Any]:
    """A text, messages or any JSON value as the audience may have it, and what was applied."""
    wish, n_bytes = await _read(request, proxy, TextRequest)
    ((form, value),) = wish.given.items()

    def make(guard: TextGuard) -> Guarded[Any]:
        found: Guarded[Any] = getattr(guard, form)(value, wish.secrets)
        return found

    async with proxy.admit(who, n_bytes // _BYTES_PER_TOKEN) as usage:
        usage.used_tokens = usage.reserved
        hop = await proxy.text_hops.open(
            who,
            who.agent,
            wish.audience,
            secrets=wish.secrets,
            conversation=wish.conversation,
            request_id=proxy.request_id(request.headers),
        )
        try:
            made = await proxy.text_hops.guarded(hop, make)
            await proxy.text_hops.finish(hop)
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError)
            reason = "the client hung up" if left else type(error).__name__
            event: Event = "aborted" if left else "failed"
            await asyncio.shield(proxy.text_hops.end(hop, event, reason))
            raise
    return {
        form: made,
        "applied": {
            "source": who.agent,
            "audience": wish.audience,
            "forbid": list(hop.edge.forbid),
            "policy_digest": hop.edge.digest,
            "hidden": hop.counts(),
        },
    }


@router.post("/lcguard/v1/text/restore", tags=["lcguard"], openapi_extra=_body(RestoreRequest))
async def restore_text(request: Request, proxy: Running, who: Caller) -> dict[str, Any]:
    """The same with the placeholders' values, as far as the policy lets the caller have them."""
    wish, n_bytes = await _read(request, proxy, RestoreRequest)
    ((form, value),) = wish.given.items()
    async with proxy.admit(who, n_bytes // _BYTES_PER_TOKEN) as usage:
        usage.used_tokens = usage.reserved
        made, n, left = await proxy.text_hops.restore(
            who, wish.conversation, value, proxy.request_id(request.headers)
        )
    return {form: made, "restored": n, "kept": left}


async def _read(request: Request, proxy: Proxy, form: type[R]) -> tuple[R, int]:
    """The body and its size. Raises ``ProxyError`` (400, 408, 413, 415)."""
    limits, headers = proxy.settings.limits, dict(request.headers)
    try:
        raw = await read_body(
            request.receive, headers, limits.max_body_bytes, limits.body_timeout_s
        )
        return form.model_validate(parse_object(raw, headers)), len(raw)
    except ClientGone:
        raise ProxyError(400, "the body ended too early", code="bad_json") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise ProxyError(400, f"{where}: {first['msg']}", code="bad_request", param=where) from None
