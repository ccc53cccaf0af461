"""Decides whether a handoff may happen: the same checks in the front end and in the engine.

The front end turns a refusal into an HTTP status; the engine repeats the checks, because a request
may come to it by another way, and fails closed there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lcguard.handoff.audiences import Hop, check_hops, hops_of, scan_digest
from lcguard.handoff.content import content_of
from lcguard.handoff.errors import GrantError, HandoffError, LineageError
from lcguard.handoff.grants import (
    check_grant,
    check_order,
    check_scan,
    make_grant,
    new_handle,
    sign_scan,
)
from lcguard.handoff.lineage import check_current, origins
from lcguard.handoff.plan import ModelFacts, Plan, PlannedCopy, PublishPlan
from lcguard.handoff.policy import Edge, Policy, cannot_find
from lcguard.handoff.redaction import covered
from lcguard.handoff.request import Consume, EnginePublish, Handoff
from lcguard.manifest import Manifest, SegmentError
from lcguard.reloading import ReloadingFile, in_force
from lcguard.rule import Rule
from lcguard.store import SegmentNotFound, SegmentStore, StoreError
from lcguard.value_search import merged

SCAN_S = 600
"""Seconds for which the engine's word on a scanned prompt holds."""


class Gatekeeper:
    """Checks requests against policy, grants, store and model."""

    def __init__(
        self,
        facts: ModelFacts,
        policy: Policy | ReloadingFile[Policy],
        guards: Sequence[str],
        store: SegmentStore,
        key: bytes,
        *,
        clock: Callable[[], float] = time.time,
        proxy_only: bool = False,
        policy_guards: Collection[str] = (),
        finders: Collection[str] = (),
    ) -> None:
        """
        Args:
            proxy_only: refuses what its proxy has not signed.
            policy_guards: those of ``guards`` that hide whatever a rule forbids.
            finders: those that look for secrets themselves, and then need the prompt without them.
        """
        self.facts, self._policy, self.guards = facts, policy, tuple(guards)
        self.store, self.key, self.clock, self.proxy_only = store, key, clock, proxy_only
        self.policy_guards, self.finders = frozenset(policy_guards), frozenset(finders)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return in_force(self._policy)

    def plan(
        self,
        handoff: Handoff,
        prompt: Sequence[int] | None,
        *,
        samples: int = 1,
        segments: tuple[Manifest, ...] | None = None,
    ) -> Plan:
        """Checks a request whose ``prompt`` starts with the placeholders of what it consumes.

        ``segments``: what ``segments()`` gave for this request, where it was called already.

        Raises ``HandoffError`` with the status and the reason.
        """
        self.check_origin(handoff)
        if prompt is None:
            raise HandoffError(400, "a handoff needs a prompt of text or tokens, not of embeddings")
        if segments is None:
            segments = self.segments(handoff.consume) if handoff.consume is not None else ()
        # whoever fills the model's context must not count the segments' tokens by it
        shown = sum(map(self.shown_tokens, segments))
        n_own = len(prompt) - sum(m.n_tokens for m in segments)
        room = self.facts.max_model_len - shown - n_own
        if segments:
            self._check_placeholders(prompt, n_own)
            if room < 1:
                raise HandoffError(
                    400,
                    f"the prompt's {n_own} tokens and the {shown} counted for what it consumes "
                    f"leave no room in the model's {self.facts.max_model_len}",
                )
        publish = None
        if handoff.publish is not None:
            if samples != 1:
                raise HandoffError(400, f"n={samples}: a publish request takes n=1")
            publish = self._publish(handoff.publish, segments, prompt)
        agent = handoff.consume.agent if handoff.consume else ""
        return Plan(segments, agent, publish, shown, room)

    def _check_placeholders(self, prompt: Sequence[int], n_own: int) -> None:
        """Raises ``HandoffError`` unless all but the last ``n_own`` tokens are placeholders."""
        if n_own < 1:
            raise HandoffError(
                400, "the prompt has none but consumed tokens: add at least one of your own"
            )
        placeholder = self.facts.placeholder_id
        wrong = next((t for t in prompt[: len(prompt) - n_own] if t != placeholder), None)
        if wrong is not None:
            raise HandoffError(
                400,
                f"token {wrong} stands where a consumed one has its place: those must all be the "
                f"placeholder {placeholder}, or leave out placed",
            )

    def shown_tokens(self, manifest: Manifest) -> int:
        """What the audience of a segment may know of its length."""
        edge = self.policy.for_edge(manifest.source_agent, manifest.audience)
        return edge.shown_tokens(manifest.n_tokens)

    def check_origin(self, handoff: Handoff) -> None:
        """Raises ``GrantError`` for one that did not come from the proxy, where only those are
        taken."""
        if self.proxy_only:
            check_order(self.key, handoff.text(), handoff.order or "", self.clock())

    def segments(self, consume: Consume) -> tuple[Manifest, ...]:
        """Verified manifests of what a request consumes. Raises ``HandoffError``."""
        return tuple(self._segment(g.handle, g.grant, consume.agent) for g in consume.segments)

    def _segment(self, handle: str, grant: str, agent: str) -> Manifest:
        shown = f"segment {handle[:6]}..."
        try:
            # before the store: without a grant nobody learns which handles exist
            check_grant(self.key, handle, agent, grant, self.clock())
            manifest = self.store.manifest(handle)
            manifest.check(
                self.key,
                {
                    "handle": handle,
                    "audience": agent,
                    "revision": self.facts.revision,
                    "config_digest": self.facts.config_digest,
                    "rope": self.facts.rope,
                },
            )
            if manifest.expires_at_s and self.clock() >= manifest.expires_at_s:
                raise HandoffError(404, f"{shown} expired: publish again")
            check_current(manifest, self.policy)
        except SegmentNotFound:
            raise HandoffError(
                404, f"{shown} does not exist: it expired, was revoked or never was"
            ) from None
        except SegmentError as error:
            raise HandoffError(400, f"{shown} cannot be used: {error}") from None
        except StoreError as error:
            raise HandoffError(503, f"{shown} cannot be read: {error}") from None
        except (GrantError, LineageError) as error:
            raise HandoffError(error.status, f"{shown}: {error}") from None
        return manifest

    def edge(self, publish: EnginePublish, consumed: Sequence[Manifest] = ()) -> Edge:
        """The rule that this request is published under, that of its first audience where it has
        several: they differ in their names alone. Raises ``HandoffError``."""
        return hops_of(self.policy, publish, consumed)[0].joint

    def _publish(
        self, publish: EnginePublish, consumed: Sequence[Manifest], prompt: Sequence[int]
    ) -> PublishPlan:
        hops = hops_of(self.policy, publish, consumed)
        edge = hops[0].joint
        if edge.guard not in self.guards:
            raise HandoffError(
                400,
                f"the policy wants guard {edge.guard!r} on {edge.name.in_words}, the engine has "
                f"{', '.join(self.guards)}: add it to guards",
            )
        if any(hop.joint.fixed_length for hop in hops):
            raise HandoffError(
                400, "fixed_length is not supported inside vLLM: segments keep their token count"
            )
        learnt, finds = edge.guard in self.policy_guards, edge.guard in self.finders
        check_hops(hops, consumed, learnt, finds)
        start = sum(m.n_tokens for m in consumed)
        own_tokens = prompt[start:]
        if not own_tokens:
            raise HandoffError(400, "the prompt has no tokens of its own to publish")
        self._check_custom(edge, publish, own_tokens)
        scan = edge.guard in self.finders and publish.scan is None
        if edge.guard == "redact":
            self._check_redacted(publish, own_tokens)
        elif edge.guard in self.finders and not scan:
            # the engine must have looked for secrets in this prompt, and signed what it left of it
            self._check_covered(publish.spans or (), own_tokens)
            check_scan(self.key, scan_digest(hops), own_tokens, str(publish.scan), self.clock())
        elif scan and publish.spans is not None:
            raise HandoffError(
                400, f"guard {edge.guard!r} finds what to hide itself: leave spans out"
            )
        elif publish.spans is not None:
            raise HandoffError(
                400, f"spans are for guard 'redact'; this edge has {edge.guard!r}: leave them out"
            )
        content = content_of(
            self.key,
            [edge.source, _audiences(hops), list(edge.forbid), list(edge.derive)],
            [self.facts.revision, self.facts.config_digest],
            consumed,
            own_tokens,
        )
        now_s = self.clock()
        return PublishPlan(
            copies=tuple(
                PlannedCopy(
                    handle=one.handle or new_handle(),
                    audience=one.audience,
                    policy_digest=hop.alone.digest,
                    expires_at_s=int(now_s + hop.alone.ttl_s),
                )
                for one, hop in zip(publish.each(), hops, strict=True)
            ),
            source=publish.source,
            guard=edge.guard,
            rule=edge.rule,
            origins=origins(publish.source, consumed),
            hop=max((m.hop for m in consumed), default=-1) + 1,
            start_token=start,
            custom=edge.definitions,
            content=content,
            scan_rule=scan_digest(hops),
            scan=scan,
            told=publish.told or (),
        )

    def _check_custom(self, edge: Edge, publish: EnginePublish, own: Sequence[int]) -> None:
        """The policy's own categories must have been looked for, as it defines them now."""
        told = edge.guard in self.finders
        if publish.told is not None:
            if not told:
                raise HandoffError(
                    400, f"told is for guards that find secrets, not {edge.guard!r}: leave it out"
                )
            self._check_covered(publish.told, own)
        if not edge.custom:
            return
        if edge.guard != "redact" and not told:
            raise HandoffError(400, f"{edge.name.in_words}: {cannot_find(edge.guard, edge.custom)}")
        looked_for = publish.looked_for or {}
        stale = [c for c, digest in edge.definitions.items() if looked_for.get(c) != digest]
        if stale or (told and publish.told is None):
            raise HandoffError(
                400,
                f"nobody looked in this prompt for {', '.join(stale or edge.custom)} as the policy "
                "in force defines it: publish through the proxy or GuardedLLM, or try again",
            )

    def _check_redacted(self, publish: EnginePublish, own: Sequence[int]) -> None:
        """Every span must already hold neutral tokens: the front end overwrites them."""
        if publish.spans is None:
            raise HandoffError(
                400,
                f"guard 'redact' on {publish.edge_name.in_words} hides what its publisher names: "
                "name secrets, or spans, their token ranges ([] for none), or choose another guard "
                "for this edge in the policy",
            )
        self._check_covered(publish.spans, own)

    def _check_covered(self, spans: Sequence[tuple[int, int]], own: Sequence[int]) -> None:
        for start, end in spans:
            if not 0 <= start < end <= len(own):
                raise HandoffError(
                    400, f"span [{start}, {end}) is not within the prompt's {len(own)} tokens"
                )
            if any(t != self.facts.neutral_id for t in own[start:end]):
                raise HandoffError(
                    400,
                    f"span [{start}, {end}) still holds its secret: load the general plugin "
                    "lcguard (VLLM_PLUGINS) or send the prompt with neutral tokens",
                )

    def scanned(
        self, plan: PublishPlan, own: Sequence[int], found: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """What the front end needs to publish a prompt that the guard has looked for secrets in:
        ``found``, token ranges of ``own``, and the engine's word on what is left."""
        found = merged([*found, *plan.told])
        ids = covered(own, found, self.facts.neutral_id)
        until_s = int(self.clock()) + SCAN_S
        signature = sign_scan(self.key, plan.scan_rule, ids, until_s)
        return {"spans": [list(span) for span in found], "scan": signature}

    def answer_planned(self, plan: PublishPlan, n_tokens: int) -> dict[str, Any]:
        """What the publisher learns of the segments of this plan."""
        made = [self._answer(copy, plan.guard, plan.rule, n_tokens) for copy in plan.copies]
        return _together(made)

    def answer_stored(self, publish: EnginePublish, stored: Sequence[Manifest]) -> dict[str, Any]:
        """What the publisher learns of segments that are ``stored``, in its audiences' order.
        Raises ``HandoffError``."""
        edge = self.edge(publish)
        return _together([self._answer(m, edge.guard, edge.rule, m.n_tokens) for m in stored])

    def _answer(
        self, segment: PlannedCopy | Manifest, guard: str, rule: Rule, n_tokens: int
    ) -> dict[str, Any]:
        handle, audience, until = segment.handle, segment.audience, segment.expires_at_s
        return {
            "handle": handle,
            "grant": make_grant(self.key, handle, audience, until),
            "audience": audience,
            "expires_at_s": until,
            "n_tokens": n_tokens,
            "guard": guard,
            "forbid": list(rule.forbid),
            "derive": list(rule.derive),
            "placeholder_id": self.facts.placeholder_id,
        }


def _together(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first audience's answer, with those of the others in it."""
    first, *others = answers
    return {**first, "also": others} if others else first


def _audiences(hops: Sequence[Hop]) -> str | list[str]:
    """Those whom a draw of noise is for: another set of them gets another draw."""
    names = sorted(hop.joint.audience for hop in hops)
    return names if len(names) > 1 else names[0]
