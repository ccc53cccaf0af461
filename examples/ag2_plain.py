"""Two AG2 (AutoGen) agents on one stream: intake reads a note, billing goes on."""

import asyncio
import os

from ag2 import Agent, MemoryStream, Middleware
from ag2.config import OpenAIConfig

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."


def agent(name: str, *middleware: Middleware) -> Agent:
    key = os.environ[f"{name.upper()}_KEY"]
    config = OpenAIConfig("nano", base_url=URL, api_key=key, temperature=0, max_tokens=24)
    return Agent(name, config=config, middleware=middleware)


async def main() -> None:
    stream = MemoryStream()
    await agent("intake").ask(NOTE, stream=stream)
    billing = agent("billing")
    found = await billing.ask("What is the SSN?", stream=stream)
    print(f"billing: {await found.content()}")


asyncio.run(main())
