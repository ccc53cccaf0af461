"""Two Google ADK agents in one session: intake reads a note, billing goes on."""

import asyncio
import os

from google.adk.agents import LlmAgent
from google.adk.integrations.openai import OpenAILlm
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.genai import types

from lcguard.client import AsyncClient
from lcguard.integrations.adk import guard_request

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."


def agent(name: str) -> LlmAgent:
    key = os.environ[f"{name.upper()}_KEY"]
    model = OpenAILlm(model="nano", base_url=URL, api_key=key, max_tokens=24)
    return LlmAgent(name=name, model=model)


async def main() -> None:
    intake, billing = agent("intake"), agent("billing")
    sender = AsyncClient(URL, os.environ["INTAKE_KEY"])
    billing.before_model_callback = guard_request(sender, "billing", secrets=[])
    sessions = InMemorySessionService()
    session = await sessions.create_session(app_name="desk", user_id="desk")
    for reader, text in ((intake, NOTE), (billing, "What is the SSN?")):
        runner = Runner(app_name="desk", agent=reader, session_service=sessions)
        said = types.UserContent(text)
        events = runner.run_async(user_id="desk", session_id=session.id, new_message=said)
        async for event in events:
            if event.content:
                print(f"{event.author}: {event.content.parts[0].text}")


asyncio.run(main())
