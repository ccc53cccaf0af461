"""LangGraph: a node that guards the messages of a state between two agents.

graph.add_node("guard", guard_messages(lcguard.text_guard("policy.yaml", "intake", "billing")))
graph.add_edge("intake", "guard").add_edge("guard", "billing")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.messages import RemoveMessage, messages_from_dict, messages_to_dict

from lcguard.text.guard import TextGuard

_ALL = "__remove_all__"
"""What LangGraph's reducer of messages calls all that came before."""


def guard_messages(
    guard: TextGuard, key: str = "messages", secrets: Sequence[str] | None = None
) -> Callable[[Mapping[str, Any]], dict[str, list[Any]]]:
    """A node after which a state holds what the guard's audience may read, in place of what it
    held: contents, names, tool calls and whatever else a message carries.

    Args:
        key: of the messages in the state; its reducer is LangGraph's ``add_messages``.
        secrets: values to hide beside those that the guard knows.

    The node raises ``HandoffError`` for messages that cannot be guarded, and the graph stops. Other
    keys of the state, and earlier checkpoints, are as they were.
    """

    def node(state: Mapping[str, Any]) -> dict[str, list[Any]]:
        made = guard.json(messages_to_dict(state[key]), secrets)
        return {key: [RemoveMessage(id=_ALL), *messages_from_dict(made.value)]}

    return node
