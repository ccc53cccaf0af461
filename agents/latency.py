"""How long a whole graph takes: text, raw KV and guarded KV, one scenario at a time.

With text an agent reads all that it was handed, and its own context behind it; with KV it reads its
own context alone, and a guard rewrites what it publishes. Writing the text is not counted: an agent
that phrases its message token by token takes far longer, so this is the comparison that favours
text. Times are medians of runs that alternate between the three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from lcguard.agents.backends.base import Reference, Turn
from lcguard.agents.backends.hf import HFBackend
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.topology import Topology
from lcguard.categories import CATEGORIES
from lcguard.protocols import Guard
from lcguard.records import TokenRecord
from lcguard.rule import Rule


@dataclass(frozen=True)
class Latency:
    """Medians over ``runs``, each over the whole graph."""

    text_ms: float
    kv_ms: float
    guarded_ms: float
    context_tokens: int
    runs: int


def latency(
    model: HFBackend, topology: Topology, guard: Guard, runs: int = 5, context_tokens: int = 512
) -> Latency:
    """Raises ``ValueError`` for fewer than one run."""
    if runs < 1:
        raise ValueError(f"runs={runs} must be at least 1")
    context = _context(model, context_tokens)
    ways: dict[str, Callable[[], None]] = {
        "text": lambda: _text(model, topology, context),
        "kv": lambda: _kv(HFAgents(model, "kv"), model, topology, context),
        "guarded": lambda: _kv(HFAgents(model, "guarded", {"*": guard}), model, topology, context),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(runs + 1):  # the first is warm-up
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if i:
                spent[name].append((time.perf_counter() - started) * 1e3)
    median = {name: statistics.median(values) for name, values in spent.items()}
    return Latency(median["text"], median["kv"], median["guarded"], context_tokens, runs)


def _context(model: HFBackend, n_tokens: int) -> tuple[int, ...]:
    """Filler of exactly so many tokens: what it says does not matter to the clock."""
    piece = model.encoder.context(
        "The file was checked last week. A copy was sent to the archive. "
    )
    return (piece * (n_tokens // len(piece) + 1))[:n_tokens]


def _text(model: HFBackend, topology: Topology, context: tuple[int, ...]) -> None:
    for agent in topology.agents:
        before = context * len(topology.incoming(agent))
        model.source.prefill([before + context])


def _kv(agents: HFAgents, model: HFBackend, topology: Topology, context: tuple[int, ...]) -> None:
    inbox: dict[str, tuple[Reference, ...]] = dict.fromkeys(topology.agents, ())
    for generation in topology.generations():
        for agent in generation:
            out = topology.outgoing(agent)
            if not out:  # reads what it was handed, and its own context on top
                model.source.prefill([context], on=agents.consumed([inbox[agent]]))
                continue
            records = tuple(
                TokenRecord(agent, "s", link.name, "", "", context, (), (), Rule(CATEGORIES))
                for link in out
            )
            (made,) = agents.publish([Turn("s", agent, inbox[agent], records)])
            for link, reference in zip(out, made, strict=True):
                inbox[link.audience] = (*inbox[link.audience], reference)
