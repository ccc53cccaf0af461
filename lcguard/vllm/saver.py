"""Pages to guarded segments: what a request publishes is guarded, and stored beside the step.

A save that fails stores nothing. Nothing here raises into the engine, nor makes it wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.logger import init_logger

from lcguard.guards.detector import runs
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.guards.passage import Passage
from lcguard.handoff.content import chain_of
from lcguard.handoff.names import EdgeName
from lcguard.handoff.plan import ModelFacts, PublishPlan
from lcguard.manifest import Lineage, Manifest, SegmentError
from lcguard.noise import new_noise_key
from lcguard.protocols import KVBatch, Mask
from lcguard.records import mask_of
from lcguard.segment import KVSegment
from lcguard.store import SegmentStore, StoreError
from lcguard.store.line import Call, StoreLine
from lcguard.vllm.draws import Draws, Rows
from lcguard.vllm.jobs import SaveJob, SaveResults
from lcguard.vllm.rank_pages import GatheredTokens, PageTokens, RankPages
from lcguard.vllm.rewrite import arithmetic, by_pages, rewrite_pages
from lcguard.vllm.scanned_prefixes import PrefixCopies

logger = init_logger("vllm.lcguard.saver")


class SegmentSaver:
    """Saves of one rank, of which the first alone stores.

    ``gather_heads`` joins the KV heads of all ranks and is the identity on one rank: a guard reads
    all heads, and segments do not depend on how a model was sharded.
    """

    def __init__(
        self,
        config: Any,
        facts: ModelFacts,
        guards: Mapping[str, FrozenGuard],
        pages: RankPages,
        prefixes: PrefixCopies,
        store: SegmentStore,
        key: bytes,
        *,
        timeout_s: float,
        gather_heads: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.config, self.facts, self.guards = config, facts, guards
        self.store, self.key, self.draws = store, key, Draws(key, store)
        self._pages, self._prefixes, self._gather_heads = pages, prefixes, gather_heads
        self._digests: WeakKeyDictionary[FrozenGuard, str] = WeakKeyDictionary()
        # one after the other: each takes over what the one before has drawn
        self._puts = StoreLine(timeout_s, threads=1)
        self._saves: dict[str, Call[None]] = {}
        """Of each handle."""
        self._lost: dict[str, str] = {}
        """Handle to why nothing of it went to the store."""
        self._found: dict[str, list[tuple[int, int]]] = {}
        """Of publishes that were only looked at."""
        self._kept: dict[str, int] = {}
        """Of the same: tokens before the first that was found, which are not computed again."""

    def save(self, job: SaveJob) -> None:
        """Guards and stores a prompt's KV. Nothing is stored where anything fails."""
        try:
            tokens = self._tokens(job)
            if self._pages.rank != 0:
                return
            if job.plan.scan:
                self._scan(job, tokens)
            else:
                self._commit(job, tokens)
        except Exception as error:
            known = isinstance(error, SegmentError | GuardError)
            log = logger.error if known else logger.exception
            log("lcguard: request %s publishes nothing: %s", job.request_id, error)
            self._lost[job.plan.handle] = "its guard failed"

    def take_saved(self) -> SaveResults:
        """Handles whose save ended since the last call, with why nothing was stored, if so."""
        found, self._found = self._found, {}
        kept, self._kept = self._kept, {}
        reasons, self._lost = self._lost | dict.fromkeys(found, ""), {}
        for handle, call in list(self._saves.items()):
            if not call.ended():
                continue
            del self._saves[handle]
            try:
                call.result()
                reasons[handle] = ""
            except Exception as error:
                if not isinstance(error, SegmentError | StoreError):
                    logger.exception("lcguard: storing segment %s... failed", handle[:6])
                reasons[handle] = str(error) or type(error).__name__
        return SaveResults(reasons, found, kept)

    def close(self) -> None:
        self._puts.close()

    @torch.inference_mode()
    def _tokens(self, job: SaveJob) -> PageTokens | GatheredTokens:
        """What is published, as a guard reads it."""
        pages, span = self._pages, (job.plan.start_token, job.n_tokens)
        if pages.world == 1:
            plan = job.plan
            noisy = self.guards[plan.guard].is_noisy(bool(plan.rule.forbid))
            return pages.tokens(job.blocks, *span, digested=noisy and not plan.scan)
        try:
            both = pages.read(job.blocks, *span)
        except Exception:
            logger.exception("lcguard: reading the KV of request %s failed", job.request_id)
            # every rank takes part in the exchange, or the others would wait for it for ever
            shape = len(pages.layers), pages.layers[0].heads, span[1] - span[0], pages.layers[0].dim
            both = (torch.full(shape, float("nan"), device=pages.device),) * 2
        keys, values = (self._gather_heads(t) for t in both)
        heads = int(self.config.num_key_value_heads)
        # ranks may hold the same heads
        keys, values = (t[:, :: max(1, t.shape[1] // heads)] for t in (keys, values))
        valid = torch.ones(1, keys.shape[2], dtype=torch.bool, device=keys.device)
        return GatheredTokens(KVBatch(keys[None], values[None], valid))

    @torch.inference_mode()
    def _scan(self, job: SaveJob, tokens: PageTokens | GatheredTokens) -> None:
        """Finds the token ranges of the prompt that the plan's guard hides. Raises
        ``GuardError``."""
        plan = job.plan
        marks = self._passage(plan, tokens).marks()
        if marks is None:
            raise GuardError(f"guard {plan.guard!r} cannot look for secrets")
        hidden = (marks[0] >= 0).int() - 1
        found = [(start, end) for start, end, _ in runs(hidden.tolist())]
        clean = min((start for start, _ in found), default=tokens.n_tokens)
        first = plan.start_token
        if kept := self._prefixes.keep(plan.handle, job.blocks, first, first + clean):
            self._kept[plan.handle] = kept
        self._found[plan.handle] = found

    def _digest(self, guard: FrozenGuard) -> str:
        """Asked for once: an engine's guards do not change, others take their place."""
        if guard not in self._digests:
            self._digests[guard] = guard.digest
        return self._digests[guard]

    def _passage(self, plan: PublishPlan, tokens: PageTokens | GatheredTokens) -> Passage:
        guard, dtype = self.guards[plan.guard], self._pages.layers[0].pages.dtype
        # the prompt is the twin already: its secrets' places hold neutral tokens
        twin = tokens if guard.needs_twin else None
        return guard.passage(tokens, _mask(plan), twin=twin, dtype=dtype)

    @torch.inference_mode()
    def _commit(self, job: SaveJob, tokens: PageTokens | GatheredTokens) -> None:
        plan, guard = job.plan, self.guards[job.plan.guard]
        chain, layers = chain_of(plan.content, self._digest(guard)), self._pages.layers
        noisy, whole = guard.is_noisy(bool(plan.rule.forbid)), not guard.keeps_tokens
        passage = self._passage(plan, tokens)
        passage.look()
        noise_key = new_noise_key()
        if noisy:
            raw = f"{tokens.digest()} {arithmetic(guard, layers)}"
            noise_key = self.draws.noise_key(chain, raw)
        shape, dtype = guard.module.shape, layers[0].pages.dtype
        size = (shape.layers, shape.kv_heads, tokens.n_tokens, shape.head_dim)
        fresh = Rows(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
        if isinstance(tokens, PageTokens) and by_pages(guard, layers):
            seen = passage.seen or ()
            rewrite_pages(guard, tokens, _mask(plan), noise_key, seen, fresh.keys, fresh.values)
        else:
            passage.fill(noise_key, fresh.keys, fresh.values)

        put: list[str] = []

        def store() -> None:
            rows = fresh
            if noisy:
                rows = self.draws.settle(chain, noise_key, fresh.keys, fresh.values, whole)
            try:
                for segment in self._segments(plan, guard, rows):
                    self.store.put(segment.sign(self.key))
                    put.append(segment.manifest.handle)
            except (SegmentError, StoreError):
                undo()  # every audience gets its own or none does
                raise
            if noisy:
                self.draws.stored(chain, rows, put)
            logger.info("lcguard: stored a segment for %s", plan.audiences)

        def undo() -> None:
            for handle in put:
                with suppress(SegmentError, StoreError):  # nobody was given it
                    self.store.delete(handle)

        self._saves[plan.handle] = self._puts.submit(store, undo)

    def _segments(self, plan: PublishPlan, guard: FrozenGuard, rows: Rows) -> Iterator[KVSegment]:
        """One for each audience: the same tensors, and nothing of the others in its manifest."""
        first: KVSegment | None = None
        for copy in plan.copies:
            own: dict[str, Any] = {
                "edge": EdgeName(plan.source, copy.audience).in_manifest,
                "policy_digest": copy.policy_digest,
                "handle": copy.handle,
                "audience": copy.audience,
                "expires_at_s": copy.expires_at_s,
            }
            if first is not None:
                yield replace(first, manifest=Manifest(**dict(first.manifest) | own))
                continue
            first = self._segment(plan, guard, rows, own)
            yield first

    def _segment(
        self, plan: PublishPlan, guard: FrozenGuard, rows: Rows, own: Mapping[str, Any]
    ) -> KVSegment:
        return KVSegment.create(
            rows.keys,
            rows.values,
            self.config,
            model_id=self.facts.model_id,
            revision=self.facts.revision,
            source_agent=plan.source,
            hop=plan.hop,
            guard_digest=self._digest(guard),
            draw=rows.draw,
            lineage=Lineage(
                forbid=plan.rule.forbid,
                derive=plan.rule.derive,
                origins=plan.origins,
                raw=type(guard) is FrozenGuard and guard.name == "identity",
                custom=plan.custom,
            ),
            **own,
        )


def _mask(plan: PublishPlan) -> Mask:
    """What the guard has to hide: own categories are no longer in the prompt once their definitions
    were looked for."""
    return mask_of([plan.rule.without(plan.custom)])
