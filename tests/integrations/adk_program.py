"""Run by ``test_adk.py`` in ADK's own environment: two agents in one session, whose models are
scripted. Prints what the second one's was asked, and how the run ended, as JSON.

Arguments: the proxy's address, the first agent's key, a case, its audience.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from typing import Any

from google.adk.agents import LlmAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.genai import types
from pydantic import Field

from lcguard.client import AsyncClient
from lcguard.integrations.adk import guard_request, read_context

URL, KEY, CASE, AUDIENCE = sys.argv[1:]
SECRETS = ["Ada Long", "912-55-1029"]
NOTE = "Ada Long called. SSN: 912-55-1029. She has back pain."


class Scripted(BaseLlm):
    """Says what it is told to, and keeps what it was asked."""

    model: str = "scripted"
    answers: list[types.Part]
    asked: list[dict[str, Any]] = Field(default_factory=list)

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        said = llm_request.model_dump(mode="json", include={"contents", "config"})
        self.asked.append({"contents": said["contents"], **said["config"]})
        part = self.answers.pop(0)
        yield LlmResponse(content=types.Content(role="model", parts=[part]))


def lookup(who: str, ssn: int) -> dict[str, Any]:
    """Finds a patient."""
    return {"found": who.upper(), "number": ssn}


async def main() -> None:
    call = types.Part(function_call=types.FunctionCall(name="lookup", args=ARGS))
    first = Scripted(answers=[call, types.Part(text="It is Ada Long.")])
    intake = LlmAgent(name="intake", model=first, tools=[lookup], output_key="found")
    client = AsyncClient(URL, KEY, "nano", max_retries=0)
    guard = guard_request(client, AUDIENCE, secrets=None if CASE == "unnamed" else SECRETS)
    second = Scripted(answers=[types.Part(text="So it is.")])
    billing = LlmAgent(
        name="billing",
        model=second,
        instruction="You know: {found}",
        before_model_callback=read_context(client) if CASE == "nothing published" else guard,
    )
    sessions = InMemorySessionService()
    session = await sessions.create_session(app_name="desk", user_id="desk")
    image = types.Part(inline_data=types.Blob(data=b"x", mime_type="image/png"))
    question = [types.Part(text="What is the SSN?"), *([image] if CASE == "image" else [])]
    events, ended = [], ""
    for agent, parts in ((intake, [types.Part(text=NOTE)]), (billing, question)):
        runner = Runner(app_name="desk", agent=agent, session_service=sessions)
        said = types.Content(role="user", parts=parts)
        try:
            async for event in runner.run_async(
                user_id="desk", session_id=session.id, new_message=said
            ):
                events.append(event.model_dump(mode="json", exclude_none=True))
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
    kept = await sessions.get_session(app_name="desk", user_id="desk", session_id=session.id)
    session_text = json.dumps(kept.model_dump(mode="json"))
    print(json.dumps({"asked": second.asked, "ended": ended, "session": session_text}))


ARGS = {"who": "ADA LONG", "ssn": 912551029}
asyncio.run(main())
