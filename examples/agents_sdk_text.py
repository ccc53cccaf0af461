"""Two agents of the OpenAI Agents SDK with one session: intake reads a note, billing goes on."""

import asyncio
import os

import lcguard
from agents import (  # noqa: TID251  # openai-agents
    Agent,
    ModelSettings,
    OpenAIProvider,
    RunConfig,
    Runner,
    SQLiteSession,
    set_tracing_disabled,
)
from lcguard.integrations.openai_agents import session_filter

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
set_tracing_disabled(True)


def config(name: str) -> RunConfig:
    provider = OpenAIProvider(base_url=URL, api_key=os.environ[f"{name.upper()}_KEY"])
    settings = ModelSettings(temperature=0)
    return RunConfig(model="nano", model_provider=provider, model_settings=settings)


async def main() -> None:
    session = SQLiteSession("case 7")
    intake, billing = config("intake"), config("billing")
    guard = lcguard.text_guard("text_policy.yaml", "intake", "billing", secrets=[])
    billing.session_input_callback = session_filter(guard)
    await Runner.run(Agent("intake"), NOTE, session=session, run_config=intake)
    found = await Runner.run(
        Agent("billing"), "What is the SSN?", session=session, run_config=billing
    )
    print(f"billing: {found.final_output}")


asyncio.run(main())
