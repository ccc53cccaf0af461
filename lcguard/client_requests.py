"""What ``lcguard.client`` asks the proxy: the arguments of its requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lcguard.client_answers import Published, Segment

if TYPE_CHECKING:
    from openai import RequestOptions

Messages = str | Sequence[Mapping[str, Any]]
"""A prompt: a text, or a conversation as OpenAI writes it."""
Audiences = list[str] | tuple[str, ...]
"""Several audiences of one publish."""
Form = Literal["text", "messages", "json"]
Handle = str | Published | Segment
Body = dict[str, Any]


def name_of(handle: Handle) -> str:
    return handle if isinstance(handle, str) else handle.handle


def _chat_body(prompt: Messages, role: str, handoff: Body, options: Mapping[str, Any]) -> Body:
    """The arguments of a chat request with a handoff."""
    messages = [{"role": role, "content": prompt}] if isinstance(prompt, str) else [*prompt]
    extra = {**options.get("extra_body", {}), "lcguard": handoff}
    return {**options, "messages": messages, "extra_body": extra}


def respond_body(
    prompt: Messages, handles: Sequence[Handle], hop: Body, options: Mapping[str, Any]
) -> Body:
    """The arguments of a response: on top of segments, with text handed over, both or neither."""
    parts = {"consume": [name_of(h) for h in handles]} if handles else {}
    handoff = parts | ({"text": hop} if hop else {})
    told: Body = {**options, "input": prompt if isinstance(prompt, str) else [*prompt]}
    if handoff:
        told["extra_body"] = {**options.get("extra_body", {}), "lcguard": handoff}
    return told


def publish_body(
    prompt: Messages,
    publish: Body,
    consume: Sequence[Handle],
    options: Mapping[str, Any],
) -> Body:
    read = {"consume": [name_of(h) for h in consume]} if consume else {}
    body = _chat_body(prompt, "system", {"publish": publish, **read}, {"max_tokens": 1, **options})
    # only what is read is published: nothing of an answer's beginning
    body["extra_body"].setdefault("add_generation_prompt", False)
    return body


def consume_body(prompt: Messages, handles: Sequence[Handle], options: Mapping[str, Any]) -> Body:
    return _chat_body(prompt, "user", {"consume": [name_of(h) for h in handles]}, options)


def given(secrets: Sequence[str] | None, **fields: Any) -> Body:
    """The fields of a handoff that were given."""
    named = None if secrets is None else [*secrets]
    return {k: v for k, v in {**fields, "secrets": named}.items() if v is not None}


def text_body(prompt: Messages, hop: Body, options: Mapping[str, Any]) -> Body:
    return _chat_body(prompt, "user", {"text": hop}, options)


def form_of(value: Any, form: Form | None) -> Form:
    return form or ("text" if isinstance(value, str) else "json")


def address(base_url: object, path: str) -> str:
    """An address of the proxy's own, beside OpenAI's."""
    root = str(base_url).rstrip("/").removesuffix("/v1")
    return f"{root}/lcguard/v1/{path}"


def cascading(cascade: bool) -> RequestOptions:
    return {"params": {"cascade": "true"}} if cascade else {}
