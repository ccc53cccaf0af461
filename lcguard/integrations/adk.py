"""Google ADK: callbacks through which an agent reads what another one may hand it, by the proxy.

    billing.before_model_callback = guard_request(intake, "billing", secrets=[])

Or KV instead of text, whose handle the session's state carries:

    intake.before_agent_callback = publish_context(intake_client, "billing", secrets=SECRETS)
    billing.before_model_callback = read_context(billing_client)

ADK needs other versions of some packages than vLLM does, so nothing here looks for values in this
process: a client of the agent that hands over (``lcguard.client.AsyncClient``) asks the proxy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from google.adk.agents.callback_context import CallbackContext
from google.adk.models import LlmRequest, LlmResponse
from google.genai import types

from lcguard.client import AsyncClient

BeforeModel = Callable[[CallbackContext, LlmRequest], Awaitable[LlmResponse | None]]
BeforeAgent = Callable[[CallbackContext], Awaitable[types.Content | None]]
_READABLE = frozenset({"text", "thought", "function_call", "function_response"})
"""Parts of a content that are text through and through."""


def guard_request(
    sender: AsyncClient, audience: str, secrets: Sequence[str] | None = None
) -> BeforeModel:
    """For ``LlmAgent(before_model_callback=...)``: before every call of its model what it is about
    to read, its instruction too, into which ADK writes other agents' results, is made what the
    edge from ``sender`` to ``audience`` lets it read.

    Args:
        sender: client of the agent that hands over.
        audience: the agent that reads, by the name of its key.
        secrets: values to hide; ``[]`` for none beside those that the edge finds.

    The run ends with an error where something cannot be looked through (``ValueError``) or the
    proxy refuses it (as the ``openai`` package raises that). The session's events stay as they
    were: who reads those reads all.
    """

    async def before_model(
        callback_context: CallbackContext, llm_request: LlmRequest
    ) -> LlmResponse | None:
        said = {
            "instruction": _instruction(llm_request),
            "contents": [_readable(content) for content in llm_request.contents],
        }
        made = await sender.guard_text(
            said,
            audience,
            secrets=secrets,
            conversation=callback_context.session.id,
            form="json",
        )
        llm_request.contents = [types.Content.model_validate(c) for c in made.value["contents"]]
        if said["instruction"]:
            llm_request.config.system_instruction = made.value["instruction"]
        return None

    return before_model


def publish_context(
    sender: AsyncClient, *audiences: str, secrets: Sequence[str] | None = None
) -> BeforeAgent:
    """For ``LlmAgent(before_agent_callback=...)``: the agent reads what the user said for each
    audience, which gets it as guarded KV, and answers nothing itself. Handles go into the session's
    state, where ``read_context`` finds them.

    Raises ``ValueError`` within the run for what is no text.
    """

    async def before_agent(callback_context: CallbackContext) -> types.Content:
        text = _text_of(callback_context.user_content)
        for audience in audiences:
            made = await sender.publish(text, audience, secrets=secrets)
            callback_context.state[_key(audience)] = made.handle
        return _said(f"Handed over to {', '.join(audiences)}.")

    return before_agent


def read_context(reader: AsyncClient, **options: Any) -> BeforeModel:
    """For ``LlmAgent(before_model_callback=...)``: the last message is answered on top of the
    segment that was published for this agent, and by nothing else of the session.

    Args:
        reader: client of the agent that reads; ADK's own model is not asked.
        options: of the chat route, such as ``max_tokens``.

    Raises ``ValueError`` within the run where nothing was published for it, or for a message that
    is no text.
    """

    async def before_model(
        callback_context: CallbackContext, llm_request: LlmRequest
    ) -> LlmResponse | None:
        name = callback_context.agent_name
        handle = callback_context.state.get(_key(name))
        if handle is None:
            raise ValueError(f"nothing was published for {name!r}: let publish_context name it")
        question = _text_of(llm_request.contents[-1] if llm_request.contents else None)
        return LlmResponse(content=_said(await reader.ask(question, handle, **options)))

    return before_model


def _key(audience: str) -> str:
    return f"lcguard_{audience}"


def _said(text: str) -> types.Content:
    return types.Content(role="model", parts=[types.Part(text=text)])


def _instruction(request: LlmRequest) -> str:
    found = request.config.system_instruction
    if found is not None and not isinstance(found, str):
        raise _unreadable("an instruction that is no text")
    return str(found or "")


def _readable(content: types.Content) -> dict[str, Any]:
    """As JSON. Raises ``ValueError`` for what is no text."""
    said: dict[str, Any] = content.model_dump(mode="json", exclude_none=True)
    for part in said.get("parts", ()):
        if other := sorted(part.keys() - _READABLE):
            raise _unreadable(f"the part {other[0]!r} of a message")
    return said


def _text_of(content: types.Content | None) -> str:
    parts = _readable(content).get("parts", []) if content is not None else []
    if not parts or any(part.keys() != {"text"} for part in parts):
        raise _unreadable("a message without text, or with more than text,")
    return "\n".join(part["text"] for part in parts)


def _unreadable(what: str) -> ValueError:
    return ValueError(f"{what} cannot be looked through: leave it out of what is handed over")
