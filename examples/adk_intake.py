"""Google ADK agents whose session holds handles of KV: intake -> (billing, scheduling)."""

import asyncio
import os

from google.adk.agents import LlmAgent
from google.adk.integrations.openai import OpenAILlm
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.genai import types

from lcguard.client import AsyncClient
from lcguard.integrations.adk import publish_context, read_context

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
SECRETS = ["Ada Long", "912-55-1029"]


def client(name: str) -> AsyncClient:
    return AsyncClient(URL, os.environ[f"{name.upper()}_KEY"], "nano")


def agent(name: str) -> LlmAgent:
    model = OpenAILlm(model="nano", base_url=URL, api_key=os.environ[f"{name.upper()}_KEY"])
    return LlmAgent(name=name, model=model)


def reader(name: str) -> LlmAgent:
    found = agent(name)
    found.before_model_callback = read_context(client(name), max_tokens=24, temperature=0)
    return found


async def main() -> None:
    intake = agent("intake")
    intake.before_agent_callback = publish_context(
        client("intake"), "billing", "scheduling", secrets=SECRETS
    )
    questions = {"billing": "What is the chief complaint?", "scheduling": "What is the SSN?"}
    asked = [(intake, NOTE), *((reader(name), text) for name, text in questions.items())]
    sessions = InMemorySessionService()
    session = await sessions.create_session(app_name="desk", user_id="desk")
    for one, text in asked:
        runner = Runner(app_name="desk", agent=one, session_service=sessions)
        said = types.UserContent(text)
        events = runner.run_async(user_id="desk", session_id=session.id, new_message=said)
        async for event in events:
            if event.content:
                print(f"{event.author}: {event.content.parts[0].text}")


asyncio.run(main())
