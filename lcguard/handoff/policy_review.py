"""What a policy says to a reader: which edge decides a hop and why, and which never serves one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

from pydantic import TypeAdapter, ValidationError

from lcguard.custom_categories import CustomCategory
from lcguard.handoff.channel import KV_ALONE
from lcguard.handoff.names import ANY, KeyName
from lcguard.handoff.policy import Edge, Policy

_KEY_NAME = TypeAdapter(KeyName)


def why(policy: Policy, source: str, audience: str) -> list[str]:
    """Lines that say which edge decides ``source -> audience``, by which of its names, what then
    holds, and which edges stand back. Raises ``PolicyError`` as ``Policy.for_edge``."""
    found = policy.matching(source, audience)
    edge = policy.for_edge(source, audience)
    hop = edge.name.in_words
    if not found:
        lines = [f"{hop}: no edge matches, so every category is forbidden"]
    else:
        others = len(found) - 1
        rank = f"the most specific of {len(found)} that match" if others else "no other matches"
        lines = [f"{hop}: {_named(policy, found[0])} decides, {rank}"]
    lifted = f"declassify {_listed(edge.declassify)}; " if edge.declassify else ""
    lines.append(
        f"forbid {_listed(edge.forbid)}; derive {_listed(edge.derive)}; {lifted}{_rest(edge)}"
    )
    lines += [f"{name}: {_found(category)}" for name, category in edge.custom.items()]
    lines += [f"{_named(policy, i)} matches too and stands back" for i in found[1:]]
    return lines


def never(policy: Policy, agents: Collection[tuple[str, str]] | None = None) -> Iterator[str]:
    """A line for each edge that no hop through the proxy can match.

    Args:
        agents: (tenant, name) of every agent with a key; None where that is not known.
    """
    for i, edge in enumerate(policy.edges):
        reason = _no_key_can(edge) or (agents is not None and _no_key_does(edge, agents))
        if reason:
            yield f"{_named(policy, i)} never matches: {reason}"


def unserved(policy: Policy, guards: Collection[str] | None = None) -> Iterator[str]:
    """A line for each edge on which an engine refuses every publish.

    Args:
        guards: names that the engine has; None where that is not known.
    """
    for i, edge in enumerate(policy.edges):
        if edge.channel == "text":
            continue
        if edge.fixed_length:
            yield f"{_named(policy, i)} refuses every publish: fixed_length is not for vLLM"
        elif guards is not None and edge.guard not in guards:
            yield (
                f"{_named(policy, i)} refuses every publish: guard {edge.guard!r} is none of the "
                f"engine's ({', '.join(sorted(guards))}); add it to engine.guards"
            )


def idle(policy: Policy) -> Iterator[str]:
    """A line for each own category that no edge of its tenant names, and for each ``detect`` that
    no guard is told of."""
    for i, edge in enumerate(policy.edges):
        if edge.detect != edge.detector and edge.on_leak != "redact":
            yield (
                f"{_named(policy, i)} says detect {edge.detect!r} and hides nothing by it: guard "
                f"{edge.guard!r} cannot be told, use redact or twin"
            )
    for tenant in (ANY, *policy.tenants):
        where = "categories" if tenant == ANY else f"tenants.{tenant}.categories"
        own = policy.custom_of(tenant)
        mine = own if tenant == ANY else policy.tenants[tenant].categories
        edges = [e for e in policy.edges if ANY in (tenant, e.tenant) or e.tenant == tenant]
        for name in mine:
            if not any(name in (*e.forbid, *e.declassify) for e in edges):
                yield f"{where}.{name} is forbidden on no edge, only where none matches"


def learned(policy: Policy) -> dict[str, CustomCategory]:
    """Where in the file each category stands that is found by a head."""
    common = policy.categories if isinstance(policy.categories, Mapping) else {}
    all_ = {f"categories.{name}": category for name, category in common.items()}
    for tenant, rules in policy.tenants.items():
        all_ |= {f"tenants.{tenant}.categories.{n}": c for n, c in rules.categories.items()}
    return {where: category for where, category in all_.items() if category.heads}


def missed(policy: Policy) -> Iterator[str]:
    """A line for each head that was measured to find less than the category asks for."""
    for where, category in learned(policy).items():
        for head in category.heads:
            held = head.card.held_out
            if held.recall_lower < category.min_recall:
                yield (
                    f"{where}: of values that are in no list its head found {held.found} of "
                    f"{held.total}, at least {held.recall_lower:.2f} of them at {held.level:.0%}, "
                    f"less than min_recall {category.min_recall:g}: give more examples and train "
                    f"again, or accept it with min_recall: {_floor(held.recall_lower):g}"
                )


def _floor(share: float) -> float:
    return int(share * 100) / 100


def _found(category: CustomCategory) -> str:
    counts = {w: n for w, n in category.size.items() if n and w != "examples"}
    parts = [f"{n} {what if n != 1 else what[:-1]}" for what, n in counts.items()]
    said = [" and ".join(parts) + ", found in any spelling"] if parts else []
    for head in category.heads:
        held = head.card.held_out
        said.append(
            f"a head trained on {head.card.n_examples} examples, which finds at least "
            f"{held.recall_lower:.2f} of further values"
        )
    return "; ".join(said)


def _no_key_can(edge: Edge) -> str:
    for name in (edge.tenant, edge.source, edge.audience):
        try:
            name == ANY or _KEY_NAME.validate_python(name)
        except ValidationError:
            return f"no API key can have the name {name!r}"
    return ""


def _no_key_does(edge: Edge, agents: Collection[tuple[str, str]]) -> str:
    tenants = {tenant for tenant, _ in agents}
    if edge.tenant != ANY and edge.tenant not in tenants:
        return f"no API key is of tenant {edge.tenant!r}{_near(edge.tenant, tenants)}"
    here = {(t, name) for t, name in agents if edge.tenant in (ANY, t)}
    names = {name for _, name in here}
    for name in (edge.source, edge.audience):
        if name != ANY and name not in names:
            where = "" if edge.tenant == ANY else f" in tenant {edge.tenant!r}"
            return f"no API key is of agent {name!r}{where}{_near(name, names)}"
    wanted = {edge.source, edge.audience} - {ANY}
    if wanted and not any(wanted <= {n for t, n in here if t == tenant} for tenant in tenants):
        return f"no tenant has API keys of both {edge.source!r} and {edge.audience!r}"
    return ""


def _near(name: str, known: Collection[str]) -> str:
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _named(policy: Policy, i: int) -> str:
    edge = policy.edges[i]
    tenant = "" if edge.tenant == ANY else f", tenant {edge.tenant}"
    return f"edges[{i}] ({edge.name.in_words}{tenant})"


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "nothing"


def _rest(edge: Edge) -> str:
    said = {"source", "audience", "tenant", "forbid", "derive", "declassify"}
    said |= {*KV_ALONE, "on_failure"} if edge.channel == "text" else {"channel", "restore"}
    rest = edge.model_dump(exclude=said)
    return "; ".join(f"{key} {value}" for key, value in rest.items() if value is not None)
