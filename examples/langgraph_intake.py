"""A LangGraph graph whose state holds handles, not text: intake -> (billing, scheduling).

pip install langgraph openai
eval "$(lcguard keys new intake billing scheduling)" && lcguard serve &
python examples/langgraph_intake.py
"""

import operator
import os
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph
from openai import OpenAI

URL = os.environ.get("LCGUARD_URL", "http://127.0.0.1:8080/v1")


class State(TypedDict):
    note: str
    handles: dict[str, str]
    answers: Annotated[list[str], operator.add]


def client(agent: str) -> OpenAI:
    return OpenAI(base_url=URL, api_key=os.environ[f"{agent.upper()}_KEY"])


def intake(state: State) -> dict:
    handles = {}
    for audience in ("billing", "scheduling"):
        made = client("intake").chat.completions.create(
            model="nano",
            max_tokens=1,
            messages=[{"role": "system", "content": state["note"]}],
            extra_body={
                "add_generation_prompt": False,
                "lcguard": {"publish": {"audience": audience}},
            },
        )
        handles[audience] = made.lcguard["published"]["handle"]
    return {"handles": handles, "note": ""}  # the text stays with intake


def reader(agent: str, question: str):
    def node(state: State) -> dict:
        answer = client(agent).chat.completions.create(
            model="nano",
            max_tokens=24,
            temperature=0,
            messages=[{"role": "user", "content": question}],
            extra_body={"lcguard": {"consume": [state["handles"][agent]]}},
        )
        return {"answers": [f"{agent}: {answer.choices[0].message.content}"]}

    return node


graph = StateGraph(State)
graph.add_node("intake", intake)
graph.add_edge(START, "intake")
for agent, question in (
    ("billing", "What is the chief complaint?"),
    ("scheduling", "What is the SSN?"),
):
    graph.add_node(agent, reader(agent, question))
    graph.add_edge("intake", agent)
    graph.add_edge(agent, END)
note = "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029."
for line in sorted(graph.compile().invoke({"note": note, "handles": {}, "answers": []})["answers"]):
    print(line)
