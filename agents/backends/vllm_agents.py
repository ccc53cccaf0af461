"""Agents on vLLM: all turns of a call are one batch of the engine, handoffs go through its store.

What an agent hands on is guarded inside the engine, by the engine's own policy; an orchestrator can
hide more than that, never less. ``edge_policy`` makes the engine's policy of a topology.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcguard.agents.backends.base import Ask, Channel, Reference, Turn
from lcguard.agents.topology import Topology
from lcguard.handoff.names import EdgeName
from lcguard.protocols import KVBatch
from lcguard.store.base import SegmentStore


def edge_policy(topology: Topology, guard: str = "gate") -> dict[str, Any]:
    """The policy under which an engine hides on every link what the topology says."""
    return {
        "version": 1,
        "edges": [
            {
                "source": x.source,
                "audience": x.audience,
                "forbid": list(x.forbid),
                "derive": list(x.derive),
                "guard": guard,
            }
            for x in topology.links
        ],
    }


@dataclass(frozen=True)
class VLLMReference:
    """A handle, with the store behind it: reading KV takes the deployment's key."""

    handle: Any
    store: SegmentStore = field(repr=False)
    secret: bytes = field(repr=False)

    @property
    def key(self) -> str:
        return str(self.handle.handle)

    def kv(self) -> KVBatch:
        """As the audience's engine gets it. Raises ``SegmentError`` for one that is gone."""
        return self.store.load(self.handle.handle, self.secret).kv()


class VLLMAgents:
    """Implements ``AgentBackend`` over a ``GuardedLLM``.

    Unlike on transformers, a segment is published once for each audience, whose edges may have
    different guards: two audiences hold two draws of the noise.

    Args:
        llm: the engine.
        store, secret: where and with which key the engine keeps segments, for ``kv()``.
        decode: token ids to text, to compare answers.
    """

    channel: Channel = "guarded"

    def __init__(
        self, llm: Any, store: SegmentStore, secret: bytes, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.llm, self.store, self.secret, self.decode = llm, store, secret, decode

    def publish(self, turns: Sequence[Turn]) -> list[list[Reference]]:
        """Raises ``HandoffError`` where the engine refuses; nothing raw is stored then."""
        requests = [
            {
                "agent": turn.agent,
                "prompt": list(turn.ids),
                "audience": EdgeName.parse(record.edge).audience,
                "policy": record.forbid,
                "consume": [_handle(r) for r in turn.consume],
                "spans": None,
            }
            for turn in turns
            for record in turn.records
        ]
        made = iter(self.llm.publish_all(requests))
        return [
            [VLLMReference(next(made), self.store, self.secret) for _ in turn.records]
            for turn in turns
        ]

    def answers(self, asks: Sequence[Ask]) -> list[list[bool]]:
        from vllm import SamplingParams

        requests, wanted = [], []
        for ask in asks:
            for q in ask.questions:
                requests.append(
                    {
                        "agent": ask.agent,
                        "prompt": list(q.prompt),
                        "consume": [_handle(r) for r in ask.consume],
                        "params": SamplingParams(temperature=0, max_tokens=len(q.answer) + 1),
                    }
                )
                wanted.append(self.decode(q.answer[:-1]).strip())
        said = iter(self.llm.generate_all(requests)) if requests else iter(())
        right = iter([next(said).strip() == w for w in wanted])
        return [[next(right) for _ in ask.questions] for ask in asks]


def _handle(reference: Reference) -> Any:
    """Raises ``ValueError`` for another backend's segment."""
    if not isinstance(reference, VLLMReference):
        raise ValueError(f"{reference.key} was not published through vLLM; use one backend a run")
    return reference.handle
