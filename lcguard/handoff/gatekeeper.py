"""Decides whether a handoff may happen: the same checks in the front end and in the engine.

The front end turns a refusal into an HTTP status; the engine repeats the checks, because a request
may come to it by another way, and fails closed there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcguard.categories import CATEGORIES, Category
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.grants import (
    GrantError,
    check_grant,
    check_order,
    check_scan,
    make_grant,
    new_handle,
    sign_scan,
)
from lcguard.handoff.lineage import LineageError, check_current, check_guard, on_top, origins
from lcguard.handoff.policy import Edge, Policy, PolicyError
from lcguard.handoff.request import Consume, Handoff, Publish
from lcguard.manifest import Manifest, SegmentError
from lcguard.reloading import ReloadingFile, in_force
from lcguard.rope import canonical
from lcguard.store import SegmentNotFound, SegmentStore, StoreError
from lcguard.vllm.draws import Content, content_of

SCAN_S = 600
"""Seconds for which the engine's word on a scanned prompt holds."""


@dataclass(frozen=True)
class ModelFacts:
    """What a segment must agree with, and the tokens that stand in for others."""

    model_id: str
    revision: str
    """Digest of the weights."""
    config_digest: str
    rope: dict[str, Any]
    placeholder_id: int
    neutral_id: int
    max_model_len: int
    """Tokens that a prompt and its answer may have together."""


@dataclass(frozen=True)
class PublishPlan:
    """Everything the worker needs to guard and store a prompt's KV."""

    handle: str
    source: str
    audience: str
    guard: str
    forbid: tuple[Category, ...]
    """Of the edge, and of what was consumed."""
    derive: tuple[Category, ...]
    policy_digest: str
    origins: tuple[str, ...]
    """Agents whose text the segment stands on."""
    expires_at_s: int
    hop: int
    start_token: int
    """First prompt token of the segment: what was consumed is not published again."""
    content: Content = field(repr=False)
    """The text: its noise is drawn from it, and it stands in no log."""
    scan: bool = False
    """True for a prompt that the guard still has to look for secrets in: nothing is stored, and the
    answer says what was found."""

    def answer(self, key: bytes, n_tokens: int, placeholder_id: int) -> dict[str, Any]:
        """What the publisher learns."""
        return _told(
            key, self.handle, self.audience, self.expires_at_s, n_tokens, self, placeholder_id
        )


@dataclass(frozen=True)
class Plan:
    """A handoff that may happen."""

    consume: tuple[Manifest, ...] = ()
    agent: str = ""
    publish: PublishPlan | None = None
    shown_tokens: int = 0
    """Of what is consumed, as far as its audience may know."""
    room_tokens: int = 0
    """Most that may be generated."""

    @property
    def n_consumed(self) -> int:
        """Placeholder tokens at the start of the prompt."""
        return sum(m.n_tokens for m in self.consume)


class Gatekeeper:
    """Checks requests against policy, grants, store and model."""

    def __init__(
        self, facts: ModelFacts, policy: Policy | ReloadingFile[Policy], guards: Sequence[str],
        store: SegmentStore, key: bytes, clock: Callable[[], float] = time.time,
        proxy_only: bool = False, by_policy: Collection[str] = (), finders: Collection[str] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            proxy_only: refuses what its proxy has not signed.
            by_policy: those of ``guards`` that hide whatever a rule forbids.
            finders: those that look for secrets themselves, and then need the prompt without them.
        """
        self.facts, self._policy, self.guards = facts, policy, tuple(guards)
        self.store, self.key, self.clock, self.proxy_only = store, key, clock, proxy_only
        self.by_policy, self.finders = frozenset(by_policy), frozenset(finders)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return in_force(self._policy)

    def plan(
        self, handoff: Handoff, prompt: Sequence[int] | None, *,
        samples: int = 1, segments: tuple[Manifest, ...] | None = None,
    ) -> Plan:  # fmt: skip
        """Checks a request whose ``prompt`` starts with the placeholders of what it consumes.

        ``segments``: what ``segments()`` gave for this request, where it was called already.

        Raises ``HandoffError`` with the status and the reason.
        """
        self.check_origin(handoff)
        if prompt is None:
            raise HandoffError(400, "a handoff needs a prompt of text or tokens, not of embeddings")
        if segments is None:
            segments = self.segments(handoff.consume) if handoff.consume is not None else ()
        n = sum(m.n_tokens for m in segments)
        # whoever fills the model's context must not count the segments' tokens by it
        shown = sum(map(self.shown_tokens, segments))
        room = self.facts.max_model_len - shown - (len(prompt) - n)
        if segments:
            if n >= len(prompt):
                raise HandoffError(
                    400, "the prompt has none but consumed tokens: add at least one of your own"
                )
            wrong = next((t for t in prompt[:n] if t != self.facts.placeholder_id), None)
            if wrong is not None:
                raise HandoffError(
                    400, f"token {wrong} stands where a consumed one has its place: those must all "
                    f"be the placeholder {self.facts.placeholder_id}, or leave out placed",
                )  # fmt: skip
            if room < 1:
                raise HandoffError(
                    400, f"the prompt's {len(prompt) - n} tokens and the {shown} counted for what "
                    f"it consumes leave no room in the model's {self.facts.max_model_len}",
                )  # fmt: skip
        publish = None
        if handoff.publish is not None:
            if samples != 1:
                raise HandoffError(400, f"n={samples}: a publish request takes n=1")
            publish = self._publish(handoff.publish, segments, prompt)
        agent = handoff.consume.agent if handoff.consume else ""
        return Plan(segments, agent, publish, shown, room)

    def shown_tokens(self, manifest: Manifest) -> int:
        """What the audience of a segment may know of its length."""
        edge = self.policy.for_edge(manifest.source_agent, manifest.audience)
        return edge.shown_tokens(manifest.n_tokens)

    def check_origin(self, handoff: Handoff) -> None:
        """Raises ``HandoffError`` (403) for one that did not come from the proxy, where only those
        are taken."""
        if not self.proxy_only:
            return
        try:
            check_order(self.key, handoff.text(), handoff.order or "", self.clock())
        except GrantError as error:
            raise HandoffError(403, str(error)) from None

    def segments(self, consume: Consume) -> tuple[Manifest, ...]:
        """Verified manifests of what a request consumes. Raises ``HandoffError``."""
        return tuple(self._segment(g.handle, g.grant, consume.agent) for g in consume.segments)

    def _segment(self, handle: str, grant: str, agent: str) -> Manifest:
        shown = f"{handle[:6]}..."
        try:
            # before the store: without a grant nobody learns which handles exist
            check_grant(self.key, handle, agent, grant, self.clock())
        except GrantError as error:
            raise HandoffError(403, f"segment {shown}: {error}") from None
        try:
            manifest = self.store.manifest(handle)
            manifest.check(
                self.key,
                expect={
                    "handle": handle,
                    "audience": agent,
                    "revision": self.facts.revision,
                    "config_digest": self.facts.config_digest,
                    "rope": self.facts.rope,
                },
            )
        except SegmentNotFound:
            raise HandoffError(
                404, f"segment {shown} does not exist: it expired, was revoked or never was"
            ) from None
        except SegmentError as error:
            raise HandoffError(400, f"segment {shown} cannot be used: {error}") from None
        except StoreError as error:
            raise HandoffError(503, f"segment {shown} cannot be read: {error}") from None
        if manifest.expires_at_s and self.clock() >= manifest.expires_at_s:
            raise HandoffError(404, f"segment {shown} expired: publish again")
        try:
            check_current(manifest, self.policy)
        except (LineageError, PolicyError) as error:
            raise HandoffError(403, f"segment {shown}: {error}") from None
        return manifest

    def answer(self, publish: Publish, stored: Manifest) -> dict[str, Any]:
        """What the publisher learns of a segment that is ``stored``. Raises ``HandoffError``."""
        edge = self.edge(publish)
        return _told(self.key, stored.handle, stored.audience, stored.expires_at_s,
                     stored.n_tokens, edge, self.facts.placeholder_id)  # fmt: skip

    def edge(self, publish: Publish) -> Edge:
        """The rule that this request is published under. Raises ``HandoffError``."""
        return edge_of(self.policy, publish)

    def _publish(
        self, publish: Publish, consumed: Sequence[Manifest], prompt: Sequence[int]
    ) -> PublishPlan:
        own = self.edge(publish)
        edge = edge_on_top(self.policy, own, consumed)
        if edge.guard not in self.guards:
            known = ", ".join(self.guards)
            raise HandoffError(
                400, f"the policy wants guard {edge.guard!r} on {publish.source} -> "
                f"{publish.audience}, the engine has {known}: add it to guards",
            )  # fmt: skip
        if edge.fixed_length:
            raise HandoffError(
                400, "fixed_length is not supported inside vLLM: segments keep their token count"
            )
        if consumed:
            check_on_top(edge, own, consumed, edge.guard in self.by_policy)
        start = sum(m.n_tokens for m in consumed)
        if start >= len(prompt):
            raise HandoffError(400, "the prompt has no tokens of its own to publish")
        own_ids, rule, scan = prompt[start:], edge_digest(edge), False
        if edge.guard == "redact":
            self._check_redacted(publish, own_ids)
        elif edge.guard in self.finders:
            scan = publish.scan is None
            if not scan:
                self._check_scanned(publish, rule, own_ids)
            elif publish.spans is not None:
                raise HandoffError(
                    400, f"guard {edge.guard!r} finds what to hide itself: leave spans out"
                )
        elif publish.spans is not None:
            raise HandoffError(
                400, f"spans are for guard 'redact'; this edge has {edge.guard!r}: leave them out"
            )
        return PublishPlan(
            handle=publish.handle or new_handle(),
            source=publish.source,
            audience=publish.audience,
            guard=edge.guard,
            forbid=edge.forbid,
            derive=edge.derive,
            policy_digest=rule,
            origins=origins(publish.source, consumed),
            expires_at_s=int(self.clock() + edge.ttl_s),
            hop=max((m.hop for m in consumed), default=-1) + 1,
            start_token=start,
            content=content_of(
                self.key,
                [edge.source, edge.audience, list(edge.forbid), list(edge.derive)],
                [self.facts.revision, self.facts.config_digest],
                consumed,
                own_ids,
            ),
            scan=scan,
        )

    def _check_redacted(self, publish: Publish, own: Sequence[int]) -> None:
        """Every span must already hold neutral tokens: the front end overwrites them."""
        if publish.spans is None:
            raise HandoffError(
                400, f"guard 'redact' on {publish.source} -> {publish.audience} hides what its "
                "publisher names: name secrets, or spans, their token ranges ([] for none), or "
                "choose another guard for this edge in the policy",
            )  # fmt: skip
        self._check_covered(publish.spans, own)

    def _check_scanned(self, publish: Publish, rule: str, own: Sequence[int]) -> None:
        """The engine must have looked for secrets in this prompt, and signed what it left of it."""
        self._check_covered(publish.spans or (), own)
        try:
            check_scan(self.key, rule, own, str(publish.scan), self.clock())
        except GrantError as error:
            raise HandoffError(403, str(error)) from None

    def scanned(
        self, plan: PublishPlan, own: Sequence[int], found: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """What the front end needs to publish a prompt that the guard has looked for secrets in:
        ``found``, token ranges of ``own``, and the engine's word on what is left."""
        ids = covered(own, found, self.facts.neutral_id)
        until_s = int(self.clock()) + SCAN_S
        signature = sign_scan(self.key, plan.policy_digest, ids, until_s)
        return {"spans": [list(span) for span in found], "scan": signature}

    def _check_covered(self, spans: Sequence[tuple[int, int]], own: Sequence[int]) -> None:
        for start, end in spans:
            if not 0 <= start < end <= len(own):
                raise HandoffError(
                    400, f"span [{start}, {end}) is not within the prompt's {len(own)} tokens"
                )
            if any(t != self.facts.neutral_id for t in own[start:end]):
                raise HandoffError(
                    400, f"span [{start}, {end}) still holds its secret: load the general plugin "
                    "lcguard (VLLM_PLUGINS) or send the prompt with neutral tokens",
                )  # fmt: skip


def covered(ids: Sequence[int], spans: Sequence[tuple[int, int]], neutral_id: int) -> list[int]:
    """Tokens with the neutral one in place of each within ``spans``."""
    out = list(ids)
    for start, end in spans:
        out[start:end] = [neutral_id] * (end - start)
    return out


def _told(
    key: bytes, handle: str, audience: str, expires_at_s: int, n_tokens: int,
    rule: PublishPlan | Edge, placeholder_id: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "handle": handle,
        "grant": make_grant(key, handle, audience, expires_at_s),
        "audience": audience,
        "expires_at_s": expires_at_s,
        "n_tokens": n_tokens,
        "guard": rule.guard,
        "forbid": list(rule.forbid),
        "derive": list(rule.derive),
        "placeholder_id": placeholder_id,
    }


def edge_of(policy: Policy, publish: Publish) -> Edge:
    """The policy's rule for this hop, tightened by what the request hides beyond it.

    Raises ``HandoffError`` (400) for a hop between tenants, and for a guard that the rule does
    not let a request choose.
    """
    try:
        edge = policy.for_edge(publish.source, publish.audience)
    except PolicyError as error:
        raise HandoffError(400, str(error)) from None
    also = set(publish.forbid or ())
    hidden = set(edge.forbid) | also
    if publish.guard not in (None, edge.guard) and edge.on_leak != publish.guard:
        raise HandoffError(
            400, f"guard {publish.guard!r} is not this edge's: leave it out, or let the policy say "
            f"on_leak: {publish.guard}",
        )  # fmt: skip
    return edge.model_copy(
        update={
            "forbid": tuple(c for c in CATEGORIES if c in hidden),
            "derive": tuple(c for c in edge.derive if c not in also),
            "ttl_s": min(edge.ttl_s, publish.ttl_s or edge.ttl_s),
            "guard": publish.guard or edge.guard,
        }
    )


def edge_on_top(policy: Policy, edge: Edge, consumed: Sequence[Manifest]) -> Edge:
    """``edge``, of ``edge_of``, with the restrictions of what was consumed. Raises ``HandoffError``
    (403)."""
    if not consumed:
        return edge
    try:
        return on_top(edge, policy, consumed)
    except (LineageError, PolicyError) as error:
        raise HandoffError(403, str(error)) from None


def check_on_top(
    edge: Edge, own: Edge, consumed: Sequence[Manifest], reads_policy: bool | None = None
) -> None:
    """Raises ``HandoffError`` (403) unless the guard keeps ``edge`` of ``edge_on_top``; see
    ``lcguard.handoff.lineage.check_guard``."""
    try:
        check_guard(edge, own, consumed, reads_policy)
    except LineageError as error:
        raise HandoffError(403, str(error)) from None


def edge_digest(edge: Edge) -> str:
    """SHA-256 of an edge's rule as it was applied."""
    return hashlib.sha256(canonical(edge.model_dump(mode="json"))).hexdigest()
