"""A LangGraph graph whose state holds handles, not text: intake -> (billing, scheduling).

pip install langgraph openai
eval "$(lcguard keys new intake billing scheduling)" && lcguard serve &
python examples/langgraph_intake.py
"""

import operator
import os
from typing import Annotated, Any, TypedDict

from langgraph.graph import START, StateGraph
from openai import OpenAI

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")
NOTE = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
SECRETS = ["Ada Long", "912-55-1029"]
QUESTIONS = {"billing": "What is the chief complaint?", "scheduling": "What is the SSN?"}


class State(TypedDict):
    note: str
    handles: dict[str, str]
    answers: Annotated[list[str], operator.add]


def key_of(agent: str) -> str:
    name = f"{agent.upper()}_KEY"
    if name not in os.environ:
        raise SystemExit(f'{name} is not set: eval "$(lcguard keys new {agent})"')
    return os.environ[name]


def chat(agent: str, role: str, text: str, handoff: dict[str, Any], **more: Any) -> Any:
    client = OpenAI(base_url=URL, api_key=key_of(agent))
    messages = [{"role": role, "content": text}]
    options = {"model": "nano", "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(
        messages=messages, **options, extra_body={"lcguard": handoff, **more}
    )


def intake(state: State) -> dict[str, Any]:
    handles = {}
    for audience in QUESTIONS:
        publish = {"publish": {"audience": audience, "secrets": SECRETS}}
        made = chat("intake", "system", state["note"], publish, add_generation_prompt=False)
        handles[audience] = made.lcguard["published"]["handle"]
    return {"handles": handles, "note": ""}  # the text stays with intake


def reader(agent: str) -> Any:
    def node(state: State) -> dict[str, Any]:
        answer = chat(agent, "user", QUESTIONS[agent], {"consume": [state["handles"][agent]]})
        return {"answers": [f"{agent}: {answer.choices[0].message.content}"]}

    return node


graph = StateGraph(State).add_node("intake", intake).add_edge(START, "intake")
for agent in QUESTIONS:
    graph.add_node(agent, reader(agent)).add_edge("intake", agent)
found = graph.compile().invoke({"note": NOTE, "handles": {}, "answers": []})
print(*sorted(found["answers"]), sep="\n")
