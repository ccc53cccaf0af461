"""A client of the proxy, on the ``openai`` package: publish, consume, inspect, revoke, leakage.

intake = Client("http://127.0.0.1:8080/v1", api_key=key)
sent = intake.publish(note, audience="billing", secrets=["Ada Long"])
print(billing.ask("What is the chief complaint?", sent))

``Client`` and ``AsyncClient`` have the same methods. What the proxy refuses is raised as the
``openai`` package raises it (``PermissionDeniedError``, ``BadRequestError``, ...), with the reason
as its message. For everything else that an OpenAI client does there is ``client.openai``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self, overload

from lcguard.client_answers import (
    EdgeLeakage,
    GuardedText,
    Published,
    RestoredText,
    Revoked,
    Segment,
    guarded_text,
    published_of,
    restored_text,
    text_of,
)
from lcguard.client_requests import (
    Audiences,
    Body,
    Form,
    Handle,
    Messages,
    address,
    cascading,
    consume_body,
    form_of,
    given,
    name_of,
    publish_body,
    respond_body,
    text_body,
)

try:
    from openai import AsyncOpenAI, OpenAI
    from openai.types.chat import ChatCompletion
    from openai.types.responses import Response
except ImportError as error:
    raise ImportError(
        "lcguard.client needs the openai package: pip install 'lcguard[client]'"
    ) from error


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
        self._at = partial(address, self.openai.base_url)

    @overload
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
    ) -> Published: ...
    @overload
    def publish(
        self,
        prompt: Messages,
        audience: Audiences,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> list[Published]: ...
    def publish(
        self,
        prompt: Messages,
        audience: str | Audiences,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> Published | list[Published]:
        """Reads a text, or a conversation, for another agent, which gets it behind the guard.

        Args:
            audience: an agent, or a list: a handle for each, of one segment that hides what any
                of their edges forbids.
            secrets: values to overwrite, for an edge with guard ``redact``; ``[]`` for none.
            forbid: categories to hide beyond those of the policy.
            ttl_s: seconds to live; the policy's where None, which it cannot exceed.
            record: what this is of, for the edge's budget of draws.
            consume: segments that the text is read on top of.
            options: of the chat route, such as ``model``.
        """
        to: Body = {"audience": audience, "forbid": [*forbid]}
        told = given(secrets, **to, ttl_s=ttl_s, record=record)
        return published_of(self._create(publish_body(prompt, told, consume, options)))

    def consume(
        self, prompt: Messages, handles: Sequence[Handle], **options: Any
    ) -> ChatCompletion:
        """OpenAI's answer to a question, or a conversation, on top of segments."""
        return self._create(consume_body(prompt, handles, options))

    def ask(self, question: Messages, *handles: Handle, **options: Any) -> str:
        """The text of ``consume``."""
        return text_of(self.consume(question, handles, **options))

    def respond(
        self,
        prompt: Messages,
        *handles: Handle,
        source: str | None = None,
        audience: str | None = None,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        **options: Any,
    ) -> Response:
        """OpenAI's response (the Responses API) to a text, or to items, on top of segments; its
        text is ``.output_text``.

        Args:
            source: whom the prompt came from, as text that is guarded.
            audience: whom the answer goes to, as text that is guarded.
            secrets, conversation: of those, as in ``guard_text``.
            options: of ``responses.create``, such as ``instructions`` or ``max_output_tokens``.
        """
        hop = given(secrets, source=source, audience=audience, conversation=conversation)
        return self._respond(respond_body(prompt, handles, hop, options))

    def inspect(self, handle: Handle) -> Segment:
        """A segment that this agent published or may consume, with its manifest."""
        return Segment.model_validate(self._get(f"segments/{name_of(handle)}"))

    def segments(self) -> list[Segment]:
        """All of them."""
        return [Segment.model_validate(row) for row in self._get("segments")["data"]]

    def revoke(self, handle: Handle, *, cascade: bool = False) -> Revoked:
        """Nobody consumes it from now on; with ``cascade`` nor what was published on top of it."""
        at, options = self._at(f"segments/{name_of(handle)}"), cascading(cascade)
        found: Any = self.openai.delete(at, cast_to=object, options=options)
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
        hop = given(secrets, source=source, audience=audience, conversation=conversation)
        return self._create(text_body(prompt, hop, options))

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
        form = form_of(value, form)
        body = {form: value, **given(secrets, audience=audience, conversation=conversation)}
        return guarded_text(self._post("text", body), form)

    def restore_text(
        self, value: Any, *, conversation: str | None = None, form: Form | None = None
    ) -> RestoredText:
        """The same with its values, as far as the policy lets this agent have them back."""
        form = form_of(value, form)
        body = {form: value, **given(None, conversation=conversation)}
        return restored_text(self._post("text/restore", body), form)

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
        found: ChatCompletion = self.openai.chat.completions.create(**self._told(body))
        return found

    def _respond(self, body: Body) -> Response:
        found: Response = self.openai.responses.create(**self._told(body))
        return found

    def _told(self, body: Body) -> Body:
        if self.model is None and "model" not in body:
            self.model = self.openai.models.list().data[0].id
        return {"model": self.model, **body}

    def _get(self, path: str) -> Any:
        return self.openai.get(self._at(path), cast_to=object)

    def _post(self, path: str, body: Body) -> Any:
        return self.openai.post(self._at(path), body=body, cast_to=object)


class AsyncClient:
    """``Client`` with coroutines."""

    def __init__(
        self, base_url: str, api_key: str | None = None, model: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.openai = AsyncOpenAI(base_url=base_url, api_key=api_key, **options)
        self._at = partial(address, self.openai.base_url)

    @overload
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
    ) -> Published: ...
    @overload
    async def publish(
        self,
        prompt: Messages,
        audience: Audiences,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> list[Published]: ...
    async def publish(
        self,
        prompt: Messages,
        audience: str | Audiences,
        *,
        secrets: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        ttl_s: float | None = None,
        record: str | None = None,
        consume: Sequence[Handle] = (),
        **options: Any,
    ) -> Published | list[Published]:
        to: Body = {"audience": audience, "forbid": [*forbid]}
        told = given(secrets, **to, ttl_s=ttl_s, record=record)
        return published_of(await self._create(publish_body(prompt, told, consume, options)))

    async def consume(
        self, prompt: Messages, handles: Sequence[Handle], **options: Any
    ) -> ChatCompletion:
        return await self._create(consume_body(prompt, handles, options))

    async def ask(self, question: Messages, *handles: Handle, **options: Any) -> str:
        return text_of(await self.consume(question, handles, **options))

    async def respond(
        self,
        prompt: Messages,
        *handles: Handle,
        source: str | None = None,
        audience: str | None = None,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        **options: Any,
    ) -> Response:
        hop = given(secrets, source=source, audience=audience, conversation=conversation)
        return await self._respond(respond_body(prompt, handles, hop, options))

    async def inspect(self, handle: Handle) -> Segment:
        return Segment.model_validate(await self._get(f"segments/{name_of(handle)}"))

    async def segments(self) -> list[Segment]:
        return [Segment.model_validate(row) for row in (await self._get("segments"))["data"]]

    async def revoke(self, handle: Handle, *, cascade: bool = False) -> Revoked:
        at, options = self._at(f"segments/{name_of(handle)}"), cascading(cascade)
        found: Any = await self.openai.delete(at, cast_to=object, options=options)
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
        hop = given(secrets, source=source, audience=audience, conversation=conversation)
        return await self._create(text_body(prompt, hop, options))

    async def guard_text(
        self,
        value: Any,
        audience: str,
        *,
        secrets: Sequence[str] | None = None,
        conversation: str | None = None,
        form: Form | None = None,
    ) -> GuardedText:
        form = form_of(value, form)
        body = {form: value, **given(secrets, audience=audience, conversation=conversation)}
        return guarded_text(await self._post("text", body), form)

    async def restore_text(
        self, value: Any, *, conversation: str | None = None, form: Form | None = None
    ) -> RestoredText:
        form = form_of(value, form)
        body = {form: value, **given(None, conversation=conversation)}
        return restored_text(await self._post("text/restore", body), form)

    async def leakage(self) -> list[EdgeLeakage]:
        return [EdgeLeakage.model_validate(row) for row in (await self._get("leakage"))["edges"]]

    async def close(self) -> None:
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _create(self, body: Body) -> ChatCompletion:
        told = await self._told(body)
        found: ChatCompletion = await self.openai.chat.completions.create(**told)
        return found

    async def _respond(self, body: Body) -> Response:
        found: Response = await self.openai.responses.create(**await self._told(body))
        return found

    async def _told(self, body: Body) -> Body:
        if self.model is None and "model" not in body:
            self.model = (await self.openai.models.list()).data[0].id
        return {"model": self.model, **body}

    async def _get(self, path: str) -> Any:
        return await self.openai.get(self._at(path), cast_to=object)

    async def _post(self, path: str, body: Body) -> Any:
        return await self.openai.post(self._at(path), body=body, cast_to=object)
