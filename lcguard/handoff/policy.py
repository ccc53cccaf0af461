"""The YAML policy: per edge, what a receiver may not learn.

    version: 1
    edges:
      - source: intake
        audience: billing
        forbid: [health, government_id]
        derive: [health]          # the risk band may pass, the value may not

Fails closed: an edge that no entry matches has every category forbidden, a category that the
policy does not list as known is forbidden everywhere, and a file with any unknown key is refused.
A guard that is not named is ``redact``: it takes no publish that does not say what is secret.

``categories`` as a mapping defines further ones (``lcguard.custom_categories``), and so does
``tenants: {acme: {categories: ...}}`` for one tenant. Edges name them as they name the others.

A deployment of several tenants names its agents ``tenant/agent``. An entry gives the two apart: it
holds for every tenant unless it names one, a tenant's own entries go before the others, and no hop
crosses tenants.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    model_validator,
)

from lcguard.canonical import canonical_digest
from lcguard.categories import CATEGORIES, DERIVABLE, Category, in_order, own_names
from lcguard.config import ConfigError, located, read_mapping, validated
from lcguard.custom_categories import CategoryName, CustomCategories, CustomCategory
from lcguard.handoff.channel import AgentName, ChannelFields, Model
from lcguard.handoff.names import ANY, EdgeName, is_agent, split_tenant
from lcguard.rule import Rule


class PolicyError(ValueError):
    """A policy that cannot be used; the message is one line with the fix."""


def _canonical(categories: tuple[str, ...]) -> tuple[str, ...]:
    """In one order, so that equal policies have equal digests; a repeated name is a mistake."""
    repeated = [c for i, c in enumerate(categories) if c in categories[:i]]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is listed twice; remove one")
    return in_order(categories)


CategorySet = Annotated[tuple[CategoryName, ...], AfterValidator(_canonical)]
KnownCategories = Annotated[tuple[Category, ...], AfterValidator(_canonical)]


def _form(value: Any) -> str:
    return "(mapping)" if isinstance(value, Mapping) else "(list)"


def _one(tenant: str) -> str:
    if tenant == ANY:
        raise ValueError("what holds for every tenant stands under categories")
    return tenant


class Edge(ChannelFields):
    """What ``audience`` may not learn from what ``source`` hands over."""

    source: AgentName
    """Agent that publishes; ``*`` for any."""
    audience: AgentName
    """Agent that consumes; ``*`` for any."""
    tenant: AgentName = ANY
    """Tenant whose agents these are; ``*`` for any."""
    forbid: CategorySet
    """Categories to hide. Required: an edge that hides nothing says so with ``[]``."""
    derive: CategorySet = ()
    """Forbidden categories whose derived value (a band) may pass."""
    declassify: CategorySet = ()
    """Categories that ``source`` may pass on from what it consumed, although the consumed segment,
    or the agent it came from, forbids them: else such restrictions travel. Audited each time."""
    guard: Annotated[str, StringConstraints(min_length=1)] = "redact"
    """Name of the guard. By default the one whose segment is made without the values, so
    that nobody can tell by trying them; its publishers name them."""
    on_failure: Literal["block"] = "block"
    """No guarded segment, no hop: raw KV is never sent instead."""
    ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0
    """Seconds after which the segment's handle is dead."""
    fixed_length: bool = False
    """Pad to a fixed token count, so that the length of the segment says nothing."""
    detect: Literal["none", "presidio", "lcguard"] = "none"
    """The proxy looks as well: beside what the publisher of ``redact`` names, who must name it, and
    what ``twin`` finds. ``presidio``: by patterns; ``lcguard``: with a small language model."""
    max_segments: Annotated[int, Field(ge=1)] | None = None
    """Composition budget: distinct segments of one source that an audience may receive within
    ``window_s``. None: any number."""
    window_s: Annotated[float, Field(gt=0, le=90 * 86400)] = 86400.0
    max_draws: Annotated[int, Field(ge=1)] | None = 2
    """Draws of noise of one record that an audience may receive within 90 days, on edges whose
    guard adds noise: several let it average the noise away. None: any number."""
    length_bucket: Annotated[int, Field(ge=1, le=65536)] = 64
    """An audience is shown a segment's length rounded up to a multiple of this; 1: the length."""
    on_leak: Literal["refuse", "redact"] = "refuse"
    """What a publisher gets once canaries were read off this edge: a refusal, or guard ``redact``
    in place of this one."""

    @model_validator(mode="after")
    def _derive_only_what_is_hidden(self) -> Edge:
        for category in self.derive:
            if category not in self.forbid:
                raise ValueError(f"derive names {category!r}; add it to forbid as well")
            if category not in DERIVABLE:
                raise ValueError(
                    f"derive names {category!r}, which has no derived value; "
                    f"only {', '.join(DERIVABLE)} have"
                )
        for category in self.declassify:
            if category in self.forbid:
                raise ValueError(
                    f"declassify names {category!r}, which the edge forbids; remove it from one"
                )
        return self

    def shown_tokens(self, n_tokens: int) -> int:
        """What the audience may know of a segment's length."""
        return -(-n_tokens // self.length_bucket) * self.length_bucket

    _custom: Mapping[str, CustomCategory] = PrivateAttr(default_factory=dict)
    """Of the hop's tenant, forbidden here or not; put in by ``Policy.for_edge``."""

    @property
    def custom(self) -> dict[str, CustomCategory]:
        """The forbidden categories that the policy defines itself, as it defines them."""
        return {name: self._custom[name] for name in self.forbid if name in self._custom}

    @property
    def detector(self) -> Literal["none", "presidio", "lcguard"]:
        """Who looks through the text: nobody where the guard could not be told."""
        return self.detect if self.guard in TOLD else "none"

    @property
    def reads_text(self) -> bool:
        """Whether the model of ``lcguard.detect`` reads what is handed over."""
        return self.detector == "lcguard" or any(own.heads for own in self.custom.values())

    @property
    def definitions(self) -> dict[str, str]:
        """Digests of ``custom``: secret, see there."""
        return {name: category.digest for name, category in self.custom.items()}

    @property
    def name(self) -> EdgeName:
        return EdgeName(self.source, self.audience)

    @property
    def rule(self) -> Rule:
        return Rule(self.forbid, self.derive)

    def under(self, rule: Rule, **changes: Any) -> Edge:
        """The same edge under another rule, and with other ``changes``."""
        return self.model_copy(update={"forbid": rule.forbid, "derive": rule.derive, **changes})

    @property
    def digest(self) -> str:
        """SHA-256 of the edge as it was applied to one hop."""
        return canonical_digest(self.model_dump(mode="json"))


_CLOSED = Edge(source=ANY, audience=ANY, forbid=CATEGORIES)


class TenantRules(Model):
    """What holds for one tenant."""

    categories: CustomCategories
    """As ``Policy.categories`` defines them for all: both together where both have a name."""


class Policy(Model):
    """All edges of a deployment."""

    version: Literal[1]
    """Version of this file format."""
    categories: Annotated[
        Annotated[KnownCategories, Tag("(list)")] | Annotated[CustomCategories, Tag("(mapping)")],
        Discriminator(_form),
    ] = CATEGORIES
    """A mapping defines categories of your own, beside the built-in ones. A list names the built-in
    categories that the author knew: any other is forbidden on every edge, so that a library update
    which adds one opens nothing."""
    tenants: dict[Annotated[AgentName, AfterValidator(_one)], TenantRules] = Field(
        default_factory=dict
    )
    """Categories of one tenant's own."""
    edges: tuple[Edge, ...]

    @model_validator(mode="after")
    def _unambiguous(self) -> Policy:
        tenants: dict[str, dict[tuple[str, str], int]] = {}
        for i, edge in enumerate(self.edges):
            self._check_names(i, edge)
            names = tenants.setdefault(edge.tenant, {})
            first = names.setdefault((edge.source, edge.audience), i)
            if first != i:
                raise ValueError(
                    f"edges[{first}] and edges[{i}] are both {edge.name.in_words}; merge them"
                )
        # `payroll -> *` and `* -> auditor` are equally specific for payroll -> auditor.
        for names in tenants.values():
            sources = [source for source, audience in names if source != ANY and audience == ANY]
            audiences = [audience for source, audience in names if source == ANY != audience]
            for pair in product(sources, audiences):
                if pair not in names:
                    raise ValueError(
                        f"edges[{names[pair[0], ANY]}] and edges[{names[ANY, pair[1]]}] both match "
                        f"{pair[0]} -> {pair[1]}; add an edge for exactly that pair"
                    )
        return self

    def _check_names(self, i: int, edge: Edge) -> None:
        """Raises for a category that nobody knows, or that the edge's guard cannot find."""
        own = self.custom_of(edge.tenant)
        for key in ("forbid", "declassify"):
            for j, name in enumerate(getattr(edge, key)):
                if name not in CATEGORIES and name not in own:
                    elsewhere = [t for t, rules in self.tenants.items() if name in rules.categories]
                    where = (
                        f"; tenants.{elsewhere[0]} has it for its own edges" if elsewhere else ""
                    )
                    message = f"not a valid value{where or _hint(name, own)}"
                    raise located(("edges", i, key, j), name, message)
        for category in edge.forbid:
            if category in CATEGORIES and category not in self.known:
                raise ValueError(f"edges[{i}].forbid names {category!r}; add it to categories")
        if (names := own_names(edge.forbid)) and edge.guard not in TOLD:
            raise located(("edges", i, "guard"), edge.guard, cannot_find(edge.guard, names))

    @property
    def known(self) -> tuple[str, ...]:
        """The built-in categories that the author knew."""
        return CATEGORIES if isinstance(self.categories, Mapping) else self.categories

    @cached_property
    def _custom(self) -> dict[str, dict[str, CustomCategory]]:
        """By tenant; ``*``: for all others."""
        common = self.categories if isinstance(self.categories, Mapping) else {}
        out = {ANY: dict(common)}
        for tenant, rules in self.tenants.items():
            out[tenant] = dict(common)
            for name, category in rules.categories.items():
                both = [common[name], category] if name in common else [category]
                out[tenant][name] = CustomCategory.joined(both)
        return out

    def custom_of(self, tenant: str) -> Mapping[str, CustomCategory]:
        """The categories that the policy defines for a tenant; ``*``: for every tenant."""
        return self._custom.get(tenant, self._custom[ANY])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the same for any order of edges and categories.

        Of own categories it says how many terms and patterns they have, not which: it is shown to
        audiences, who could try terms until one has the digest.
        """
        data = self.model_dump(mode="json", exclude={"categories", "tenants"})
        data["categories"] = list(self.known)
        if any(self._custom.values()):
            data["custom"] = {
                t: {name: category.size for name, category in own.items()}
                for t, own in self._custom.items()
            }
        data["edges"].sort(key=lambda edge: (edge["tenant"], edge["source"], edge["audience"]))
        return canonical_digest(data)

    @cached_property
    def definitions(self) -> dict[str, dict[str, str]]:
        """Digests of all own categories by tenant: secret, see ``CustomCategory.digest``."""
        return {t: {n: c.digest for n, c in own.items()} for t, own in self._custom.items()}

    def for_edge(self, source: str, audience: str) -> Edge:
        """The rule for one hop, under its concrete names; everything forbidden without a match.

        Raises ``PolicyError`` for what is no agent's name, and for a hop from one tenant to
        another.
        """
        found = self.matching(source, audience)
        own = self.custom_of(split_tenant(source)[0])
        edge = self.edges[found[0]] if found else _CLOSED
        unknown = tuple(c for c in CATEGORIES if c not in self.known)
        forbid = in_order((*edge.forbid, *unknown, *(() if found else own)))
        names = {"source": source, "audience": audience}
        hop = edge.model_copy(update={**names, "forbid": forbid})
        hop._custom = own
        return hop

    def matching(self, source: str, audience: str) -> list[int]:
        """Which of ``edges`` match a hop, most specific first: the first decides.

        Raises ``PolicyError`` as ``for_edge``.
        """
        for name in (source, audience):
            if not is_agent(name):
                raise PolicyError(f"{name!r} is no agent's name; write `agent` or `tenant/agent`")
        (tenant, giver), (other, taker) = split_tenant(source), split_tenant(audience)
        if tenant != other:
            hop = EdgeName(source, audience).in_words
            raise PolicyError(f"{hop} goes from one tenant to another")
        at = {(edge.tenant, edge.source, edge.audience): i for i, edge in enumerate(self.edges)}
        pairs = ((giver, taker), (giver, ANY), (ANY, taker), (ANY, ANY))
        wanted = ((group, *pair) for group, pair in product((tenant, ANY), pairs))
        return [at[names] for names in wanted if names in at]


TOLD = ("redact", "twin")
"""Names of guards that leave out what they are told: those that can hide own categories."""


def cannot_find(guard: str, names: Iterable[str]) -> str:
    """Why a guard is none for own categories."""
    return (
        f"guard {guard!r} knows the built-in categories alone and cannot find {', '.join(names)}: "
        "use redact, or twin"
    )


def _hint(name: str, own: Iterable[str]) -> str:
    known = [*CATEGORIES, *own]
    close = difflib.get_close_matches(name, known, 1)
    rest = "" if own else ", or define it under categories"
    return f"; did you mean {close[0]!r}?" if close else f"; use {', '.join(known)}{rest}"


_CATEGORY = tuple(f"*.{name}" for name in CustomCategory.model_fields)
_KEYS = (
    *Policy.model_fields,
    *(f"edges.{name}" for name in Edge.model_fields),
    *(f"categories.{name}" for name in _CATEGORY),
    *(f"tenants.*.{name}" for name in TenantRules.model_fields),
    *(f"tenants.*.categories.{name}" for name in _CATEGORY),
)
_SHOWN = ("version", "edges")
"""Keys whose values an error may show: it is read by more people than the policy."""


def load_policy(path: str | Path) -> Policy:
    """Reads and checks a policy file; raises ``PolicyError`` with one line that says the fix."""
    try:
        data = read_mapping(Path(path))
    except ConfigError as error:
        raise PolicyError(str(error)) from None
    return parse_policy(data, str(path), Path(path).parent)


def parse_policy(
    data: dict[str, Any],
    name: str = "policy",
    folder: Path | None = None,
    *,
    untrained: bool = False,
) -> Policy:
    """Checks a policy that is already parsed; ``name`` stands for the file in errors.

    Args:
        folder: where its relative paths start; None: where the process runs.
        untrained: read no head, for whoever is to train one. Nobody is guarded by such a policy.
    """
    context = {"folder": folder, "untrained": untrained}
    try:
        return validated(Policy, data, name, _KEYS, _SHOWN, context)
    except ConfigError as error:
        raise PolicyError(str(error)) from None


def check_finders(policy: Policy, finders: Collection[str], name: str = "policy") -> None:
    """Raises ``PolicyError`` for an edge whose own categories its guard cannot leave out, given the
    names of those that can (``lcguard.guards.frozen.finders``)."""
    for i, edge in enumerate(policy.edges):
        own = own_names(edge.forbid)
        if own and edge.guard not in finders:
            raise PolicyError(
                f"{name}: edges[{i}].guard = {edge.guard!r}: none of the engine's guards of that "
                f"name looks for secrets, so it cannot find {', '.join(own)}: use redact, or give "
                "the engine a twin under that name"
            )


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, for editors and other tools."""
    return Policy.model_json_schema()
