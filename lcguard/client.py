"""A client of the proxy, on the ``openai`` package: publish, consume, inspect, revoke, leakage.

intake = Client("http://127.0.0.1:8080/v1", api_key=key)
sent = intake.publish(note, audience="billing", secrets=["Ada Long"])
print(billing.ask("What is the chief complaint?", sent))

``Client`` and ``AsyncClient`` have the same methods. What the proxy refuses is raised as the
``openai`` package raises it (``PermissionDeniedError``, ``BadRequestError``, ...), with the reason
as its message. For everything else that an OpenAI client does there is ``client.openai``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from lcguard.client_answers import (
    EdgeLeakage,
    GuardedText,
    Published,
    RestoredText,
    Revoked,
    Segment,
)

try:
    from openai import AsyncOpenAI, OpenAI, RequestOptions
    from openai.types.chat import ChatCompletion
except ImportError as error:
    raise ImportError(
        "lcguard.client needs the openai package: pip install 'lcguard[client]'"
    ) from error

Messages = str | Sequence[Mapping[str, Any]]
"""A prompt: a text, or a conversation as OpenAI writes it."""


Form = Literal["text", "messages", "json"]
Handle = str | Published | Segment
Body = dict[str, Any]


def _name(handle: Handle) -> str:
    return handle if isinstance(handle, str) else handle.handle


def _chat(prompt: Messages, role: str, handoff: Body, options: Mapping[str, Any]) -> Body:
    """The arguments of a chat request with a handoff."""
    messages = [{"role": role, "content": prompt}] if isinstance(prompt, str) else [*prompt]
    extra = {**options.get("extra_body", {}), "lcguard": handoff}
    return {**options, "messages": messages, "extra_body": extra}


def _publish(
    prompt: Messages,
    publish: Body,
    consume: Sequence[Handle],
    options: Mapping[str, Any],
) -> Body:
    read = {"consume": [_name(h) for h in consume]} if consume else {}
    body = _chat(prompt, "system", {"publish": publish, **read}, {"max_tokens": 1, **options})
    # only what is read is published: nothing of an answer's beginning
    body["extra_body"].setdefault("add_generation_prompt", False)
    return body


def _consume(prompt: Messages, handles: Sequence[Handle], options: Mapping[str, Any]) -> Body:
    return _chat(prompt, "user", {"consume": [_name(h) for h in handles]}, options)


def _given(secrets: Sequence[str] | None, **fields: Any) -> Body:
    """The fields of a handoff that were given."""
    named = None if secrets is None else [*secrets]
    return {k: v for k, v in {**fields, "secrets": named}.items() if v is not None}


def _text_hop(prompt: Messages, hop: Body, options: Mapping[str, Any]) -> Body:
    return _chat(prompt, "user", {"text": hop}, options)


def _form(value: Any, form: Form | None) -> Form:
    return form or ("text" if isinstance(value, str) else "json")


def _handed(value: Any, form: Form, more: Body) -> Body:
    return {form: value, **more}


def _guarded_text(answer: Any, form: Form) -> GuardedText:
    return GuardedText.model_validate({**answer["applied"], "value": answer[form]})


def _restored_text(answer: Any, form: Form) -> RestoredText:
    return RestoredText(value=answer[form], restored=answer["restored"], kept=answer["kept"])


def _at(base_url: object, path: str) -> str:
    """An address of the proxy's own, beside OpenAI's."""
    root = str(base_url).rstrip("/").removesuffix("/v1")
    return f"{root}/lcguard/v1/{path}"


def _cascade(cascade: bool) -> RequestOptions:
    return {"params": {"cascade": "true"}} if cascade else {}


def _published(answer: ChatCompletion) -> Published:
    found: Any = (answer.model_extra or {}).get("lcguard") or {}
    if "published" not in found:
        raise ValueError(
            "the answer says nothing of a published segment: is base_url that of an LCGuard proxy?"
        )
    return Published.model_validate(found["published"])


def _text(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


class Client:
    """One agent; its key says which.

    Args:
        base_url: of the proxy, as for ``OpenAI``: it ends in ``/v1``.
        api_key: as ``lcguard keys new`` printed it; None reads ``OPENAI_API_KEY``.
        model: to answer; None takes the first that the key is for.
        options: of ``openai.OpenAI``, such as ``timeout`` or ``max_retries``.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, model: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.openai = OpenAI(base_url=base_url, api_key=api_key, **options)

    def publish(
        self,
        prompt: Messages,
        audience: str,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> Published:
        """Reads a text, or a conversation, for another agent, which gets it behind the guard.

        Args:
            secrets: values to overwrite, for an edge with guard ``redact``; ``[]`` for none.
            forbid: categories to hide beyond those of the policy.
            ttl_s: seconds to live; the policy's where None, which it cannot exceed.
            record: what this is of, for the edge's budget of draws.
            consume: segments that the text is read on top of.
            options: of the chat route, such as ``model``.
        """
        to = {"audience": audience, "forbid": [*forbid]}
        told = _given(secrets, **to, ttl_s=ttl_s, record=record)
        return _published(self._create(_publish(prompt, told, consume, options)))

    def consume(
        self, prompt: Messages, handles: Sequence[Handle], **options: Any
    ) -> ChatCompletion:
        """OpenAI's answer to a question, or a conversation, on top of segments."""
        return self._create(_consume(prompt, handles, options))

    def ask(self, question: Messages, *handles: Handle, **options: Any) -> str:
        """The text of ``consume``."""
        return _text(self.consume(question, handles, **options))

    def inspect(self, handle: Handle) -> Segment:
        """A segment that this agent published or may consume, with its manifest."""
        return Segment.model_validate(self._get(f"segments/{_name(handle)}"))

    def segments(self) -> list[Segment]:
        """All of them."""
        return [Segment.model_validate(row) for row in self._get("segments")["data"]]

    def revoke(self, handle: Handle, *, cascade: bool = False) -> Revoked:
        """Nobody consumes it from now on; with ``cascade`` nor what was published on top of it."""
        at = _at(self.openai.base_url, f"segments/{_name(handle)}")
        found: Any = self.openai.delete(at, cast_to=object, options=_cascade(cascade))
        return Revoked.model_validate(found)

    def chat(
        self,
        prompt: Messages,
        *,
        source: str | None = None,
        audience: str | None = None,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        **options: Any,
    ) -> ChatCompletion:
        """OpenAI's answer where text is handed over: the prompt came from ``source``, the answer
        goes to ``audience``, or both. Each is guarded under its edge."""
        hop = _given(secrets, source=source, audience=audience, conversation=conversation)
        return self._create(_text_hop(prompt, hop, options))

    def guard_text(
        self,
        value: Any,
        audience: str,
        *,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        form: Form | None = None,
    ) -> GuardedText:
        """A text, or any JSON value, as ``audience`` may have it.

        Args:
            secrets: values to hide; ``[]`` for none.
            conversation: within which a value keeps its placeholder.
            form: ``messages`` for a chat's; None takes a string as text, all else as JSON.
        """
        form = _form(value, form)
        more = _given(secrets, audience=audience, conversation=conversation)
        body = _handed(value, form, more)
        return _guarded_text(self._post("text", body), form)

    def restore_text(
        self, value: Any, *, conversation: str | None = None, form: Form | None = None
    ) -> RestoredText:
        """The same with its values, as far as the policy lets this agent have them back."""
        form = _form(value, form)
        body = _handed(value, form, _given(None, conversation=conversation))
        return _restored_text(self._post("text/restore", body), form)

    def leakage(self) -> list[EdgeLeakage]:
        """What canaries lost on the edges of this agent."""
        return [EdgeLeakage.model_validate(row) for row in self._get("leakage")["edges"]]

    def close(self) -> None:
        """Closes its connections; as a context manager it does so itself."""
        self.openai.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _create(self, body: Body) -> ChatCompletion:
        if self.model is None and "model" not in body:
            self.model = self.openai.models.list().data[0].id
        told: Body = {"model": self.model, **body}
        found: ChatCompletion = self.openai.chat.completions.create(**told)
        return found

    def _get(self, path: str) -> Any:
        return self.openai.get(_at(self.openai.base_url, path), cast_to=object)

    def _post(self, path: str, body: Body) -> Any:
        return self.openai.post(_at(self.openai.base_url, path), body=body, cast_to=object)


class AsyncClient:
    """``Client`` with coroutines."""

    def __init__(
        self, base_url: str, api_key: str | None = None, model: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.openai = AsyncOpenAI(base_url=base_url, api_key=api_key, **options)

    async def publish(
        self,
        prompt: Messages,
        audience: str,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> Published:
        to = {"audience": audience, "forbid": [*forbid]}
        told = _given(secrets, **to, ttl_s=ttl_s, record=record)
        return _published(await self._create(_publish(prompt, told, consume, options)))

    async def consume(
        self, prompt: Messages, handles: Sequence[Handle], **options: Any
    ) -> ChatCompletion:
        return await self._create(_consume(prompt, handles, options))

    async def ask(self, question: Messages, *handles: Handle, **options: Any) -> str:
        return _text(await self.consume(question, handles, **options))

    async def inspect(self, handle: Handle) -> Segment:
        return Segment.model_validate(await self._get(f"segments/{_name(handle)}"))

    async def segments(self) -> list[Segment]:
        return [Segment.model_validate(row) for row in (await self._get("segments"))["data"]]

    async def revoke(self, handle: Handle, *, cascade: bool = False) -> Revoked:
        at = _at(self.openai.base_url, f"segments/{_name(handle)}")
        found: Any = await self.openai.delete(at, cast_to=object, options=_cascade(cascade))
        return Revoked.model_validate(found)

    async def chat(
        self,
        prompt: Messages,
        *,
        source: str | None = None,
        audience: str | None = None,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        **options: Any,
    ) -> ChatCompletion:
        hop = _given(secrets, source=source, audience=audience, conversation=conversation)
        return await self._create(_text_hop(prompt, hop, options))

    async def guard_text(
        self,
        value: Any,
        audience: str,
        *,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        form: Form | None = None,
    ) -> GuardedText:
        form = _form(value, form)
        more = _given(secrets, audience=audience, conversation=conversation)
        body = _handed(value, form, more)
        return _guarded_text(await self._post("text", body), form)

    async def restore_text(
        self, value: Any, *, conversation: str | None = None, form: Form | None = None
    ) -> RestoredText:
        form = _form(value, form)
        body = _handed(value, form, _given(None, conversation=conversation))
        return _restored_text(await self._post("text/restore", body), form)

    async def leakage(self) -> list[EdgeLeakage]:
        return [EdgeLeakage.model_validate(row) for row in (await self._get("leakage"))["edges"]]

    async def close(self) -> None:
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _create(self, body: Body) -> ChatCompletion:
        if self.model is None and "model" not in body:
            self.model = (await self.openai.models.list()).data[0].id
        told: Body = {"model": self.model, **body}
        found: ChatCompletion = await self.openai.chat.completions.create(**told)
        return found

    async def _get(self, path: str) -> Any:
        return await self.openai.get(_at(self.openai.base_url, path), cast_to=object)

    async def _post(self, path: str, body: Body) -> Any:
        return await self.openai.post(_at(self.openai.base_url, path), body=body, cast_to=object)
