"""What restricts a segment: its own rule, joined with the rules of all that it stands on.

An agent that consumed a segment knows what it said, and its own tokens' KV carries traces of it. So
what it publishes on top is under three rules joined: the edge's own, the rule of each consumed
segment, and the rule from each agent whose text stands in them to the new audience: who may not
hear it from Alice does not hear it from Bob. ``declassify`` in the edge lifts categories of the
latter two. Categories that a policy defines itself travel as the others do; a segment was guarded
against those whose definition is still the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from lcguard.categories import own_names
from lcguard.handoff.channel import check_channel
from lcguard.handoff.errors import HandoffError, LineageError
from lcguard.handoff.policy import Edge, Policy, PolicyError
from lcguard.rule import Rule


class Lineage(Protocol):
    """See ``lcguard.manifest.Lineage``."""

    @property
    def rule(self) -> Rule: ...
    @property
    def origins(self) -> tuple[str, ...]: ...
    @property
    def raw(self) -> bool: ...
    @property
    def custom(self) -> Mapping[str, str]: ...


class Restricted(Protocol):
    """The part of a manifest that is read here."""

    @property
    def source_agent(self) -> str: ...
    @property
    def audience(self) -> str: ...
    @property
    def lineage(self) -> Lineage | None: ...


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
            rules.append(lineage.rule)
        rules += _from_origins(policy, lineage.origins, edge.audience)
    return Rule.joined(rules)


def on_top(edge: Edge, policy: Policy, consumed: Sequence[Restricted]) -> Edge:
    """``edge`` for a publish on top of ``consumed``. Raises ``LineageError``."""
    if not consumed:
        return edge
    extra = inherited(edge, policy, consumed).without(edge.declassify)
    return edge.under(Rule.joined([edge.rule, extra]))


def declassified(edge: Edge, policy: Policy, consumed: Sequence[Restricted]) -> tuple[str, ...]:
    """Categories that ``edge`` lets pass although what was consumed forbids them."""
    extra = inherited(edge, policy, consumed).forbid
    return tuple(c for c in extra if c in edge.declassify and c not in edge.forbid)


def check_guard(
    edge: Edge,
    own: Edge,
    consumed: Sequence[Restricted],
    reads_policy: bool | None = None,
    finds_secrets: bool | None = None,
) -> None:
    """Raises ``LineageError`` unless the edge's guard can keep the joined rule.

    Args:
        edge: from ``on_top``.
        own: the same edge before what was consumed joined it.
        reads_policy: whether the guard hides whatever a rule forbids; None where that is not known
            here, and another looks.
        finds_secrets: whether it makes the segment of a prompt without what it finds, as ``redact``
            of one without what it is told; None as above.
    """
    hop = edge.name.in_words
    exact = edge.guard == "redact" or bool(finds_secrets)
    for segment in consumed:
        # exact for the prompt's own spans, whose KV has read what was consumed
        missing = _held(segment, edge.definitions).missing(edge.rule)
        custom = own_names(missing)
        if not exact:
            missing = custom  # a guard that learnt the others looks for those itself
        if missing:
            fix = "let it forbid that too" if custom else "use guard 'gate' on this edge"
            raise LineageError(
                f"guard {edge.guard!r} on {hop} would pass on what was consumed: the segment of "
                f"{segment.source_agent} was not guarded against {', '.join(missing)}; {fix}, or "
                "publish without consuming"
            )
    if exact:
        return
    added = own.rule.missing(edge.rule)
    if added and (reads_policy is False or edge.guard == "identity"):
        raise LineageError(
            f"what was consumed forbids {', '.join(added)} to {edge.audience}, and guard "
            f"{edge.guard!r} on {hop} does not hide that: use guard 'gate' on this edge, or let "
            f"the policy say declassify: [{', '.join(added)}]"
        )


def check_current(segment: Restricted, policy: Policy) -> None:
    """Raises ``LineageError`` where the policy in force lets no KV pass there, or forbids its
    audience more than the segment was guarded against, on its own edge or on behalf of whose text
    it stands on."""
    edge = _edge(policy, segment.source_agent, segment.audience)
    try:
        check_channel(edge, "kv")
    except HandoffError as error:
        raise LineageError(str(error)) from None
    lineage = segment.lineage
    behind = [o for o in lineage.origins if o != segment.source_agent] if lineage else []
    extra = Rule.joined(_from_origins(policy, behind, segment.audience)).without(edge.declassify)
    wanted = edge.under(Rule.joined([edge.rule, extra]))
    held = _current(lineage, wanted.definitions) if lineage else Rule()
    if missing := held.missing(wanted.rule):
        raise LineageError(
            f"it was not guarded against {', '.join(missing)}, which the policy now forbids "
            f"{segment.audience}: publish it again"
        )


def origins(source: str, consumed: Sequence[Restricted]) -> tuple[str, ...]:
    """Agents whose text a segment of ``source`` on top of ``consumed`` stands on."""
    behind = {o for m in consumed if m.lineage is not None for o in m.lineage.origins}
    return tuple(sorted({source, *behind}))


def _held(segment: Restricted, definitions: Mapping[str, str]) -> Rule:
    """What a segment's KV is free of, given the definitions that hold now."""
    lineage = segment.lineage
    return Rule() if lineage is None or lineage.raw else _current(lineage, definitions)


def _current(lineage: Lineage, definitions: Mapping[str, str]) -> Rule:
    """A segment's rule without own categories that were defined otherwise when it was made."""
    own = own_names(lineage.rule.forbid)
    return lineage.rule.without(
        [c for c in own if c not in definitions or lineage.custom.get(c) != definitions[c]]
    )


def _from_origins(policy: Policy, names: Iterable[str], audience: str) -> list[Rule]:
    return [_edge(policy, name, audience).rule for name in names if name != audience]


def _edge(policy: Policy, source: str, audience: str) -> Edge:
    try:
        return policy.for_edge(source, audience)
    except PolicyError as error:
        raise LineageError(str(error)) from None
