"""What the orchestrator asks of a backend: read and publish, then answer. HF and vLLM alike.

A *turn* is one agent's part in one scenario: it consumes segments, reads its private context on top
of them and publishes its own tokens' segment for each audience. A *reference* is a published
segment; whoever holds it can read its KV, which is what an attacker who receives it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lcguard.protocols import KVBatch
from lcguard.records import TokenQuestion, TokenRecord

Channel = Literal["text", "kv", "guarded"]
"""How a hop is made: tokens that the receiver reads again, raw KV, or KV through the guard."""


class Reference(Protocol):
    """A published segment."""

    @property
    def key(self) -> str:
        """Equal for two references to one stored segment."""
        ...

    def kv(self) -> KVBatch:
        """One row ``[1, L, H, T, D]``. Raises ``ValueError`` on the text channel."""
        ...


@dataclass(frozen=True)
class Turn:
    """One agent's part in one scenario."""

    scenario: str
    agent: str
    consume: tuple[Reference, ...]
    records: tuple[TokenRecord, ...]
    """What the agent read, once for each audience: the tokens are the same, the policy differs."""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.records[0].ids


@dataclass(frozen=True)
class Ask:
    """Questions that an agent answers from what it received."""

    agent: str
    consume: tuple[Reference, ...]
    questions: tuple[TokenQuestion, ...]


class AgentBackend(Protocol):
    """Runs agents. Several turns of one call have nothing to do with each other: a backend may,
    and both of ours do, run them at the same time."""

    channel: Channel

    def publish(self, turns: Sequence[Turn]) -> list[list[Reference]]:
        """For every turn one reference per record, in order. A guard that fails raises: nothing
        raw takes its place."""
        ...

    def answers(self, asks: Sequence[Ask]) -> list[list[bool]]:
        """For every ask and question: was the greedy answer exactly right?"""
        ...
