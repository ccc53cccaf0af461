"""OpenAI Agents SDK: filters that guard what the next agent, or the next run, reads.

guard = lcguard.text_guard("policy.yaml", "intake", "billing")
intake = Agent("intake", handoffs=[handoff(billing, input_filter=handoff_filter(guard))])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agents import HandoffInputData, ItemHelpers  # noqa: TID251
from lcguard.text.guard import TextGuard


def handoff_filter(
    guard: TextGuard, secrets: Sequence[str] | None = None
) -> Callable[[HandoffInputData], HandoffInputData]:
    """An ``input_filter``: the next agent reads the whole conversation so far, tool calls and their
    results included, as the guard's audience may.

    ``secrets``: values to hide beside those that the guard knows. The filter raises
    ``HandoffError`` for what cannot be guarded, and the run ends. What the run returns and a
    session keeps of the first agent's turns is as it was: it belongs to who started the run.
    """

    def filtered(data: HandoffInputData) -> HandoffInputData:
        new = data.new_items if data.input_items is None else data.input_items
        past = data.input_history
        said = [
            *ItemHelpers.input_to_new_input_list(past if isinstance(past, str) else [*past]),
            *(item.to_input_item() for item in (*data.pre_handoff_items, *new)),
        ]
        made: list[Any] = guard.messages(said, secrets).value
        return data.clone(input_history=tuple(made), pre_handoff_items=(), input_items=())

    return filtered


def session_filter(
    guard: TextGuard, secrets: Sequence[str] | None = None
) -> Callable[[list[Any], list[Any]], list[Any]]:
    """A ``RunConfig(session_input_callback=...)``: an agent that goes on from a session which
    another one wrote reads its history as the guard's audience may; the new input is its own."""

    def combined(history: list[Any], new: list[Any]) -> list[Any]:
        return [*guard.messages(history, secrets).value, *new] if history else new

    return combined
