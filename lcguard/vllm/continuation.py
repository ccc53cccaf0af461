"""What vLLM renders behind a consumed segment: the client's turns, and nothing by default.

A segment stands for the conversation's beginning. A chat template does not know that: it begins
every conversation anew, with a BOS token or a system turn of its own, which would then stand in
the middle. So the client's messages are rendered behind a stand-in for the beginning, which is cut
off again. A text prompt gets no BOS token either, unless the request asks for it.

vLLM's request goes through two of its methods, ``preprocess_chat`` or ``preprocess_cmpl`` of the
server's renderer, which know the request, and ``render_chat_async``, which knows the template.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.request import PARAM
from lcguard.vllm.errors import as_http

Message = dict[str, Any]
Render = Callable[[list[Message], Any], Awaitable[tuple[list[Any], dict[str, Any]]]]
"""Messages and vLLM's ``ChatParams`` -> conversation and engine input."""

LEADS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "x"},),
    ({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}),
)
"""Stand-ins for the beginning. Templates that want turns to alternate take one of the two."""
_SHOWN = ("tools", "documents")
"""What a client sends beside its messages and a template may show anywhere."""
_SYSTEM = ("system", "developer")
_behind_segment: ContextVar[bool] = ContextVar("behind_segment", default=False)


def consumes(request: Any) -> bool:
    """Whether a request of vLLM's server consumes segments."""
    params = getattr(request, "kv_transfer_params", None)
    handoff = params.get(PARAM) if isinstance(params, Mapping) else None
    return isinstance(handoff, Mapping) and bool(handoff.get("consume"))


def preprocess_chat(original: Any) -> Any:
    """Wraps ``OnlineRenderer.preprocess_chat``."""

    async def wrapped(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        mark = _behind_segment.set(consumes(request))
        try:
            return await original(self, request, *args, **kwargs)
        finally:
            _behind_segment.reset(mark)

    return wrapped


def preprocess_cmpl(original: Any) -> Any:
    """Wraps ``OnlineRenderer.preprocess_cmpl``."""

    async def wrapped(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if consumes(request) and "add_special_tokens" not in request.model_fields_set:
            request.add_special_tokens = False
        return await original(self, request, *args, **kwargs)

    return wrapped


def render_chat_async(original: Any) -> Any:
    """Wraps ``BaseRenderer.render_chat_async``."""

    async def wrapped(
        self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _behind_segment.get():
            return await original(self, conversations, chat_params, *args, **kwargs)

        async def render(messages: list[Message], params: Any) -> tuple[list[Any], dict[str, Any]]:
            (talk,), (prompt,) = await original(self, [messages], params, *args, **kwargs)
            return talk, prompt

        bos = getattr(self.get_tokenizer(), "bos_token_id", None)
        try:
            done = [await continued(render, list(c), chat_params, bos) for c in conversations]
        except HandoffError as error:
            raise as_http(error) from None
        return [talk for talk, _ in done], [prompt for _, prompt in done]

    return wrapped


async def continued(
    render: Render, messages: list[Message], params: Any, bos_id: int | None
) -> tuple[list[Any], dict[str, Any]]:
    """Conversation and engine input of ``messages`` that go on with one that has begun.

    Raises what ``render`` does for the messages, and ``HandoffError`` (400) for a template that
    gives no turn without beginning a conversation.
    """
    shown = {k: None for k in _SHOWN if params.chat_template_kwargs.get(k)}
    for lead in LEADS:
        try:
            begun = _tokens((await render(list(lead), _closed(params)))[1])
            if shown and begun != _tokens((await render(list(lead), _closed(params, **shown)))[1]):
                # they stand in the beginning that would be cut off
                return await _after_system(render, messages, params, bos_id)
            talk, prompt = await render([*lead, *messages], params)
        except Exception:  # templates refuse an order of roles by raising what they like
            continue
        if prompt.get("type", "token") != "token":
            break  # no text alone: refused where a handoff is admitted
        whole = _tokens(prompt)
        if begun and whole[: len(begun)] == begun and len(whole) > len(begun):
            return talk[len(lead) :], _with(prompt, whole[len(begun) :])
    talk, prompt = await render(messages, params)
    if prompt.get("type", "token") != "token":
        return talk, prompt
    if _role(messages) not in _SYSTEM:
        raise HandoffError(
            400,
            "this model's chat template begins a conversation with every request, and a "
            "consumed segment is one that has begun: send a system message first, or use "
            "/v1/completions",
        )
    return talk, _without_bos(prompt, bos_id)


async def _after_system(
    render: Render, messages: list[Message], params: Any, bos_id: int | None
) -> tuple[list[Any], dict[str, Any]]:
    """Templates show tools in the system turn: an empty one keeps their default text out."""
    if _role(messages) not in _SYSTEM:
        try:
            talk, prompt = await render([{"role": "system", "content": ""}, *messages], params)
            return talk[1:], _without_bos(prompt, bos_id)
        except Exception:  # a template without system role
            pass
    talk, prompt = await render(messages, params)
    return talk, _without_bos(prompt, bos_id)


def _closed(params: Any, **changed: None) -> Any:
    """The parameters for whole turns: no generation prompt, nothing to be continued."""
    whole = {"add_generation_prompt": False, "continue_final_message": False}
    return replace(params, chat_template_kwargs=params.chat_template_kwargs | whole | changed)


def _role(messages: list[Message]) -> str:
    return str(messages[0].get("role")) if messages else ""


def _tokens(prompt: Mapping[str, Any]) -> list[int]:
    return list(prompt["prompt_token_ids"])


def _without_bos(prompt: dict[str, Any], bos_id: int | None) -> dict[str, Any]:
    ids = _tokens(prompt)
    return _with(prompt, ids[1:]) if bos_id is not None and ids[:1] == [bos_id] else prompt


def _with(prompt: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The engine input with other tokens; the text that it had is no longer theirs."""
    return {k: v for k, v in prompt.items() if k != "prompt"} | {"prompt_token_ids": ids}
