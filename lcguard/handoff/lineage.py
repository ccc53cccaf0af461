"""What restricts a segment: its own rule, joined with the rules of all that it stands on.

An agent that consumed a segment knows what it said, and its own tokens' KV carries traces of it. So
what it publishes on top is under three rules joined: the edge's own, the rule of each consumed
segment, and the rule from each agent whose text stands in them to the new audience: who may not
hear it from Alice does not hear it from Bob. ``declassify`` in the edge lifts categories of the
latter two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from lcguard.categories import CATEGORIES, Category
from lcguard.handoff.policy import Edge, Policy

Rule = tuple[Sequence[Category], Sequence[Category]]
"""Forbidden categories, and those of them whose derived value may pass."""


class Lineage(Protocol):
    """See ``lcguard.manifest.Lineage``."""

    @property
    def forbid(self) -> tuple[Category, ...]: ...
    @property
    def derive(self) -> tuple[Category, ...]: ...
    @property
    def origins(self) -> tuple[str, ...]: ...
    @property
    def raw(self) -> bool: ...


class Restricted(Protocol):
    """The part of a manifest that is read here."""

    @property
    def source_agent(self) -> str: ...
    @property
    def audience(self) -> str: ...
    @property
    def lineage(self) -> Lineage | None: ...


class LineageError(PermissionError):
    """What may not be passed on under these rules. One line with the fix."""


def joined(rules: Iterable[Rule]) -> Rule:
    """The rule that is as strict as all of them: a category is forbidden if any forbids it, and a
    value may be derived only where every rule that forbids it says so."""
    found = list(rules)
    forbid = [c for c in CATEGORIES if any(c in f for f, _ in found)]
    exact = {c for f, d in found for c in f if c not in d}
    return tuple(forbid), tuple(c for c in forbid if c not in exact)


def inherited(edge: Edge, policy: Policy, consumed: Sequence[Restricted]) -> Rule:
    """What ``consumed`` adds to ``edge``, before anything of it is declassified.

    Raises ``LineageError`` for a segment of which nobody knows what it stands on.
    """
    rules: list[Rule] = []
    for segment in consumed:
        lineage = segment.lineage
        if lineage is None:
            raise LineageError(
                f"a segment of {segment.source_agent} does not say what it stands on: nothing is "
                "published on top of it; let it be published again"
            )
        if set(lineage.origins) != {edge.audience}:  # back to where all of it came from
            rules.append((lineage.forbid, lineage.derive))
        rules += _from_origins(policy, lineage.origins, edge.audience)
    return joined(rules)


def on_top(edge: Edge, policy: Policy, consumed: Sequence[Restricted]) -> Edge:
    """``edge`` for a publish on top of ``consumed``. Raises ``LineageError``."""
    extra, derive = inherited(edge, policy, consumed)
    kept = [c for c in extra if c not in edge.declassify]
    forbid, may_derive = joined([(edge.forbid, edge.derive), (kept, derive)])
    return edge.model_copy(update={"forbid": tuple(forbid), "derive": tuple(may_derive)})


def declassified(edge: Edge, policy: Policy, consumed: Sequence[Restricted]) -> tuple[str, ...]:
    """Categories that ``edge`` lets pass although what was consumed forbids them."""
    extra, _ = inherited(edge, policy, consumed)
    return tuple(c for c in extra if c in edge.declassify and c not in edge.forbid)


def check_guard(
    edge: Edge, own: Edge, consumed: Sequence[Restricted], reads_policy: bool | None
) -> None:
    """Raises ``LineageError`` unless the edge's guard can keep the joined rule.

    Args:
        edge: from ``on_top``.
        own: the same edge before what was consumed joined it.
        reads_policy: whether the guard hides whatever a rule forbids; None where that is not known
            here, and another looks.
    """
    hop = f"{edge.source} -> {edge.audience}"
    if edge.guard == "redact":
        # exact for the prompt's own spans, whose KV has read what was consumed
        for segment in consumed:
            lineage = segment.lineage
            held = None if lineage is None or lineage.raw else lineage
            if missing := _lacking(held, (edge.forbid, edge.derive)):
                raise LineageError(
                    f"guard 'redact' on {hop} would pass on what was consumed: the segment of "
                    f"{segment.source_agent} was not guarded against {', '.join(missing)}; use "
                    "guard 'gate' on this edge, or publish without consuming"
                )
        return
    added = _lacking_rule((own.forbid, own.derive), (edge.forbid, edge.derive))
    if added and (reads_policy is False or edge.guard == "identity"):
        raise LineageError(
            f"what was consumed forbids {', '.join(added)} to {edge.audience}, and guard "
            f"{edge.guard!r} on {hop} does not hide that: use guard 'gate' on this edge, or let "
            f"the policy say declassify: [{', '.join(added)}]"
        )


def check_current(segment: Restricted, policy: Policy) -> None:
    """Raises ``LineageError`` where the policy in force forbids its audience more than the segment
    was guarded against, on its own edge or on behalf of whose text it stands on."""
    edge = policy.for_edge(segment.source_agent, segment.audience)
    lineage = segment.lineage
    behind = () if lineage is None else tuple(
        o for o in lineage.origins if o != segment.source_agent
    )  # fmt: skip
    forbid, derive = joined(_from_origins(policy, behind, segment.audience))
    kept = [c for c in forbid if c not in edge.declassify]
    wanted = joined([(edge.forbid, edge.derive), (kept, derive)])
    if missing := _lacking(lineage, wanted):
        raise LineageError(
            f"it was not guarded against {', '.join(missing)}, which the policy now forbids "
            f"{segment.audience}: publish it again"
        )


def origins(source: str, consumed: Sequence[Restricted]) -> tuple[str, ...]:
    """Agents whose text a segment of ``source`` on top of ``consumed`` stands on."""
    behind = {o for m in consumed if m.lineage is not None for o in m.lineage.origins}
    return tuple(sorted({source, *behind}))


def _from_origins(policy: Policy, names: Iterable[str], audience: str) -> list[Rule]:
    edges = [policy.for_edge(name, audience) for name in names if name != audience]
    return [(e.forbid, e.derive) for e in edges]


def _lacking(lineage: Lineage | None, wanted: Rule) -> tuple[Category, ...]:
    have: Rule = ((), ()) if lineage is None else (lineage.forbid, lineage.derive)
    return _lacking_rule(have, wanted)


def _lacking_rule(have: Rule, wanted: Rule) -> tuple[Category, ...]:
    """Categories that ``wanted`` forbids, or forbids exactly, and ``have`` does not."""
    return tuple(c for c in wanted[0] if c not in have[0] or (c in have[1] and c not in wanted[1]))
