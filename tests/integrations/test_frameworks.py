"""Frameworks for agents, the real packages: what one agent hands another is guarded on the way."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from typing import Annotated, Any, TypedDict

import pytest

import lcguard
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.policy import parse_policy
from lcguard.text.guard import TextGuard

SECRETS = ["Ada Long", "912-55-1029"]
NOTE = "Ada Long called. SSN: 912-55-1029. She has back pain."


@pytest.fixture
def guard() -> TextGuard:
    edge = {"source": "intake", "audience": "billing", "channel": "text"}
    policy = parse_policy({"version": 1, "edges": [edge | {"forbid": ["person", "government_id"]}]})
    return lcguard.text_guard(policy, "intake", "billing", key=bytes(range(32)), secrets=SECRETS)


def clean(seen: Any) -> str:
    text = json.dumps(seen, default=str, ensure_ascii=False)
    assert not any(secret in text for secret in SECRETS), text
    assert "back pain" in text
    return text


class TestLangGraph:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("langgraph")

    def ran(self, guard: TextGuard, first: list[Any], *more: str) -> Any:
        """What the second agent saw."""
        from langgraph.graph import START, StateGraph
        from langgraph.graph.message import add_messages

        from lcguard.integrations.langgraph import guard_messages

        State = TypedDict("State", {"messages": Annotated[list[Any], add_messages]})  # noqa: UP013
        seen = list[Any]()
        graph = StateGraph(State)
        graph.add_node("intake", lambda state: {"messages": first})
        graph.add_node("guard", guard_messages(guard, secrets=more or None))
        graph.add_node("billing", lambda state: seen.extend(state["messages"]) or {"messages": []})
        graph.add_edge(START, "intake").add_edge("intake", "guard").add_edge("guard", "billing")
        graph.compile().invoke({"messages": [("user", NOTE)]})
        return seen

    def test_messages_tool_calls_and_results(self, guard: TextGuard) -> None:
        from langchain_core.messages import AIMessage, ToolMessage

        call = {"name": "find", "args": {"who": "ADA LONG", "ssn": 912551029}, "id": "call-1"}
        said = AIMessage("", tool_calls=[call], name="intake")
        answer = ToolMessage('{"ssn": "912551029", "note": "x"}', tool_call_id="call-1")
        seen = self.ran(guard, [said, answer])
        assert [m.type for m in seen] == ["human", "ai", "tool"]
        text = clean([m.model_dump() for m in seen])
        assert "ADA LONG" not in text
        assert "912551029" not in text
        assert seen[1].tool_calls[0]["id"] == seen[2].tool_call_id == "call-1"
        assert set(json.loads(seen[2].content)) == {"ssn", "note"}
        # one value, one placeholder, wherever it stands
        assert seen[1].tool_calls[0]["args"]["who"] == seen[0].content.split(" called")[0]

    def test_the_graph_stops_at_what_cannot_be_guarded(self, guard: TextGuard) -> None:
        edge = {"source": "intake", "audience": "billing", "channel": "text", "forbid": ["health"]}
        policy = parse_policy({"version": 1, "edges": [edge]})
        unnamed = lcguard.text_guard(policy, "intake", "billing", key=bytes(range(32)))
        with pytest.raises(HandoffError, match="name the values to hide on intake -> billing"):
            self.ran(unnamed, [])
        assert "pain" not in str(self.ran(unnamed, [], "back pain"))


class TestAgentsSDK:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("agents.testing", reason="openai-agents is not installed")
        import_module("agents").set_tracing_disabled(True)

    def test_a_handoff_with_a_tool_round(self, guard: TextGuard) -> None:
        from agents.testing import (  # noqa: TID251
            ScriptedModel,
            assistant_message,
            function_call,
        )

        from agents import Agent, Runner, function_tool, handoff  # noqa: TID251
        from lcguard.integrations.openai_agents import handoff_filter

        @function_tool
        def find(who: str) -> str:
            return json.dumps({"who": who, "ssn": "912 55 1029", "says": "back pain"})

        model = ScriptedModel(
            [
                [function_call("find", {"who": "Ada Long"}, call_id="1")],
                [
                    assistant_message("Ada Long it is."),
                    function_call("transfer_to_billing", {}, call_id="2"),
                ],
                [assistant_message("done")],
            ]
        )
        billing = Agent("billing", model=model)
        way = handoff(billing, input_filter=handoff_filter(guard))
        intake = Agent("intake", model=model, tools=[find], handoffs=[way])
        found = asyncio.run(Runner.run(intake, NOTE))
        assert found.final_output == "done"
        assert found.last_agent is billing
        first, _, last = (call.input for call in model.calls)
        assert SECRETS[0] in str(first)  # intake reads all
        text = clean(last)
        assert "912 55 1029" not in text
        kinds = [item.get("type", item.get("role")) for item in last]
        assert kinds.count("function_call") == kinds.count("function_call_output") == 2
        for item in last:
            if item.get("type") == "function_call":
                json.loads(item["arguments"])
        model.assert_complete()

    def test_a_session_that_another_agent_wrote(self, guard: TextGuard) -> None:
        from agents.testing import ScriptedModel, assistant_message  # noqa: TID251

        from agents import Agent, RunConfig, Runner, SQLiteSession  # noqa: TID251
        from lcguard.integrations.openai_agents import session_filter

        session = SQLiteSession("case 7")
        model = ScriptedModel([[assistant_message("Noted: Ada Long.")], [assistant_message("ok")]])
        filtered = RunConfig(session_input_callback=session_filter(guard))

        async def both() -> None:
            await Runner.run(Agent("intake", model=model), NOTE, session=session)
            billing = Agent("billing", model=model)
            await Runner.run(billing, "And Ada Long?", session=session, run_config=filtered)

        asyncio.run(both())
        session.close()
        seen: Any = model.calls[-1].input
        clean(seen[:-1])
        assert "Ada Long" in str(seen[-1])  # the new input is billing's own


class TestAG2:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("ag2")

    def ran(self, guard: TextGuard, *first: Any) -> list[Any]:
        """What the second agent's model was called with, over a stream that a first one wrote."""
        from ag2 import Agent, MemoryStream, Middleware, tool
        from ag2.middleware import BaseMiddleware
        from ag2.testing import TestConfig

        from lcguard.integrations.ag2 import guard_events

        seen = list[Any]()

        class Seen(BaseMiddleware):
            async def on_llm_call(self, call_next: Any, events: Any, context: Any) -> Any:
                seen.extend(events)
                return await call_next(events, context)

        @tool
        def find(who: str, ssn: int) -> dict[str, str]:
            return {"ssn": "912551029", "note": "x"}

        async def both() -> None:
            stream = MemoryStream()
            intake = Agent("intake", config=TestConfig(*first), tools=[find])
            await intake.ask(NOTE, stream=stream)
            guards = [guard_events(guard), Middleware(Seen)]
            billing = Agent("billing", config=TestConfig("Understood."), middleware=guards)
            await billing.ask("What is the SSN?", stream=stream)

        asyncio.run(both())
        return seen

    def test_a_conversation_with_a_tool_round(self, guard: TextGuard) -> None:
        from ag2.events import ModelRequest, ModelResponse, ToolCallEvent, ToolResultsEvent

        call = ToolCallEvent("find", arguments='{"who": "ADA LONG", "ssn": 912551029}')
        seen = self.ran(guard, call, "Ada Long has back pain.")
        kinds = (ModelRequest, ModelResponse, ToolResultsEvent)
        asked, called, results, said, question = (e for e in seen if isinstance(e, kinds))
        text = clean([e.to_dict() for e in seen])
        assert "ADA LONG" not in text
        assert "912551029" not in text
        made = called.tool_calls.calls[0]
        assert set(json.loads(made.arguments)) == {"who", "ssn"}
        assert made.id == call.id == results.results[0].parent_id
        assert "back pain" in asked.parts[0].content
        assert "back pain" in said.message.content
        assert question.parts[0].content == "What is the SSN?"

    def test_the_turn_ends_at_what_cannot_be_looked_through(self, guard: TextGuard) -> None:
        from ag2.events import ModelMessage, ModelResponse
        from ag2.events.types import BinaryResult

        drawn = ModelResponse(ModelMessage("Here."), files=[BinaryResult(b"\x89PNG")])
        with pytest.raises(HandoffError, match="files of a reply cannot be looked through"):
            self.ran(guard, drawn)
