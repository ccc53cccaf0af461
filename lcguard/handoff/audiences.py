"""One publish for several audiences: the edges' rules as one, so that one guard pass serves all.

What is hidden is what any of the edges forbids, and a value may be derived only where every edge
that forbids it says so. No audience gets more than a publish of its own would give it; it may get
less. All get the same draw of noise: together they know what each knows alone, where publishes of
their own would let them average two.

Nobody gets anything where one of the edges refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcguard.canonical import canonical_digest
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.lineage import Restricted, check_guard, on_top
from lcguard.handoff.policy import Edge, Policy
from lcguard.handoff.request import EnginePublish, check_findable, edge_of
from lcguard.rule import Rule


@dataclass(frozen=True)
class Hop:
    """The way to one of the audiences."""

    own: Edge
    """The policy's rule, tightened by the request."""
    alone: Edge
    """With what was consumed on top: what a publish for this audience alone goes by, and all of the
    rule that its audience is shown."""
    joint: Edge
    """With what the other edges hide as well: how the segment is made."""


def hops_of(
    policy: Policy, publish: EnginePublish, consumed: Sequence[Restricted] = ()
) -> tuple[Hop, ...]:
    """Of each audience, in the publish's order.

    Raises ``HandoffError``: as ``edge_of`` and ``on_top``, and 400 for edges that one guard pass
    cannot serve.
    """
    own = [_edge(policy, one, len(publish.also)) for one in publish.each()]
    alone = [on_top(edge, policy, consumed) for edge in own]
    check_alike(alone)
    rule = Rule.joined(edge.rule for edge in alone)
    several = len(alone) > 1
    return tuple(
        Hop(mine, edge, edge.under(rule) if several else edge)
        for mine, edge in zip(own, alone, strict=True)
    )


def check_alike(edges: Sequence[Edge]) -> None:
    """Raises ``HandoffError`` (400) for edges that hide in different ways."""
    first = edges[0]
    how: tuple[tuple[str, Callable[[Edge], str]], ...] = (
        ("guard", lambda edge: edge.guard),
        ("detect", lambda edge: edge.detector),
    )
    for name, value in how:
        other = next((edge for edge in edges if value(edge) != value(first)), None)
        if other is not None:
            raise HandoffError(
                400,
                f"{first.name.in_words} has {name} {value(first)!r} and {other.name.in_words} has "
                f"{value(other)!r}: one publish hides in one way, publish to them apart or give "
                f"both edges the same {name}",
            )


def check_hops(
    hops: Sequence[Hop],
    consumed: Sequence[Restricted],
    reads_policy: bool | None = None,
    finds_secrets: bool | None = None,
) -> None:
    """Raises ``HandoffError`` unless the guard can keep the rule of each; see ``check_guard``."""
    check_findable(hops[0].joint)
    # each as if it stood alone: what only another's edge forbids did not come from what was
    # consumed, and held against all of them it is held against their union
    for hop in hops:
        check_guard(hop.alone, hop.own, consumed, reads_policy, finds_secrets)


def scan_digest(hops: Sequence[Hop]) -> str:
    """Names the rules under which a guard has looked for secrets: a look under fewer is none under
    more."""
    if len(hops) == 1:
        return hops[0].joint.digest
    return canonical_digest(sorted(hop.joint.digest for hop in hops))


def _edge(policy: Policy, publish: EnginePublish, n_others: int) -> Edge:
    try:
        return edge_of(policy, publish)
    except HandoffError as error:
        if not n_others or error.status != 403:
            raise
        raise HandoffError(
            error.status, f"{error}; for the others, leave this audience out", error.param
        ) from None
