"""The connector's half in a worker: pages to guarded segment, and segment to pages.

Pages are read and written in bulk around the forward pass, on the tensors that vLLM registered, so
this needs no layer hooks and works under full CUDA graphs. The store is asked beside it: its answer
is looked for after each step. A failed load ends its own request; a failed save stores nothing.
Neither ever raises into the engine, nor makes it wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from lcguard.guards.detector import runs
from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.handoff.gatekeeper import ModelFacts
from lcguard.manifest import Lineage, SegmentError
from lcguard.protocols import Guarded, KVBatch
from lcguard.records import mask_of
from lcguard.rope import Rotary
from lcguard.segment import KVSegment
from lcguard.store import SegmentStore, StoreError
from lcguard.store.line import Call, StoreLine
from lcguard.vllm.draws import Draws, Rows, chain_of
from lcguard.vllm.jobs import LoadJob, Saved, SaveJob
from lcguard.vllm.pages import LayerPages, gather_layers, slots_of, write_layers
from lcguard.vllm.rewrite import has_page_form, rewrite_pages
from lcguard.vllm.selfcheck import check_rewriting

logger = init_logger("vllm.lcguard.worker")
SWEEP_EVERY_S = 60.0


class HandoffWorker:
    """Worker side of one rank.

    ``gather_heads`` joins the KV heads of all ranks and is the identity on one rank: a guard reads
    all heads, and segments do not depend on how a model was sharded.
    """

    def __init__(
        self, config: Any, facts: ModelFacts, guards: Mapping[str, FrozenGuard],
        store: SegmentStore, line: StoreLine, key: bytes, *, block_size: int, rank: int = 0,
        world: int = 1, gather_heads: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:  # fmt: skip
        self.config, self.facts, self.guards = config, facts, dict(guards)
        self.store, self._line, self.key, self.block_size = store, line, key, block_size
        self.rank, self.world, self.gather_heads = rank, world, gather_heads
        self.draws = Draws(key, store)
        self.rotary = Rotary.from_config(config)
        self.layers: list[LayerPages] = []
        self._loads: dict[str, tuple[LoadJob, Call[list[KVSegment]]]] = {}
        # one after the other: each takes over what the one before has drawn
        self._puts = StoreLine(line.timeout_s, threads=1)
        self._saves: dict[str, Call[None]] = {}
        """Of each handle."""
        self._lost: dict[str, str] = {}
        """Handle to why nothing of it went to the store."""
        self._found: dict[str, list[tuple[int, int]]] = {}
        """Of publishes that were only looked at."""
        self._refused: set[str] = set()
        self._swept_s = 0.0

    def register(self, layers: list[LayerPages]) -> None:
        """Takes the engine's pages, in layer order, and proves that it reads and guards them
        right."""
        for layer in layers:
            layer.probe()
        if self.world == 1:  # several ranks rewrite with the guards' modules
            check_rewriting(self.guards, layers, self.rotary)
        self.layers = layers

    # -- consume

    def load(self, job: LoadJob) -> None:
        """Asks for a request's segments; its first tokens are filled when they are there."""
        if job.failure:
            logger.error("lcguard: request %s gets no KV: %s", job.request_id, job.failure)
            self._refused.add(job.request_id)
            return
        self._loads[job.request_id] = job, self._line.submit(lambda: self._fetch(job))

    def take_loaded(self) -> tuple[set[str], set[str]]:
        """Requests whose load ended since the last call, and those of them that failed."""
        done, failed = self._refused, set(self._refused)
        self._refused = set()
        for request_id, (job, call) in list(self._loads.items()):
            if not call.ended():
                continue
            del self._loads[request_id]
            done.add(request_id)
            try:
                # here, between two steps: vLLM frees the blocks of a load that it heard the end of
                self._fill(job, call.result())
            except Exception as error:
                logger.error("lcguard: request %s gets no KV: %s", request_id, error)
                failed.add(request_id)
        return done, failed

    def _fetch(self, job: LoadJob) -> list[KVSegment]:
        """The segments that are not there already, in order."""
        found, offset = [], 0
        for wanted in job.segments:
            offset += wanted.n_tokens
            if offset > job.skip:
                segment = self.store.load(wanted.handle, self.key)
                if segment.manifest.hmac != wanted.hmac:
                    raise SegmentError(f"segment {wanted.handle[:6]}... changed since it was asked")
                found.append(segment)
        return found

    @torch.inference_mode()
    def _fill(self, job: LoadJob, segments: list[KVSegment]) -> None:
        offset = sum(w.n_tokens for w in job.segments) - sum(
            s.manifest.n_tokens for s in segments
        )  # fmt: skip
        for segment in segments:
            self._place(segment, job.blocks, offset, max(offset, job.skip))
            offset += segment.manifest.n_tokens

    def _place(self, segment: KVSegment, blocks: list[int], offset: int, first: int) -> None:
        """Tokens ``first ..`` of a segment that stands at ``offset``."""
        device = self.layers[0].pages.device
        keys, values = (t[:, :, first - offset :] for t in (segment.keys, segment.values))
        keys, values = self._own_heads(keys).to(device), self._own_heads(values).to(device)
        end = first + keys.shape[2]
        positions = torch.arange(first, end, device=device)
        rotated = self.rotary.rotate(keys, positions)
        slots = slots_of(blocks, self.block_size, first, end).to(device)
        write_layers(self.layers, slots, rotated, values)

    def _own_heads(self, tensor: Tensor) -> Tensor:
        """This rank's heads of ``[L, H, T, D]``; with more ranks than heads, ranks share heads."""
        heads, total = self.layers[0].heads, tensor.shape[1]
        first = (
            self.rank * heads if heads * self.world <= total else self.rank * total // self.world
        )
        return tensor[:, first : first + heads]

    # -- publish

    def save(self, job: SaveJob) -> None:
        """Guards and stores a prompt's KV. Nothing is stored where anything fails."""
        keys: Tensor | None = None
        values: Tensor | None = None
        try:
            keys, values = self._read(job)
        except Exception:
            logger.exception("lcguard: reading the KV of request %s failed", job.request_id)
        # every rank takes part in the exchange, or the others would wait for it for ever
        if self.world > 1 and (keys is None or values is None):
            shape = (len(self.layers), self.layers[0].heads, 1, self.layers[0].dim)
            keys = values = torch.full(shape, float("nan"), device=self.layers[0].pages.device)
        if keys is None or values is None:
            self._lost[job.plan.handle] = "its KV could not be read"
            return
        keys, values = self.gather_heads(keys), self.gather_heads(values)
        if self.rank != 0:
            return
        try:
            if job.plan.scan:
                self._found[job.plan.handle] = self._scanned(job, keys, values)
            else:
                self._commit(job, keys, values)
        except Exception as error:
            known = isinstance(error, SegmentError | GuardError)
            log = logger.error if known else logger.exception
            log("lcguard: request %s publishes nothing: %s", job.request_id, error)
            self._lost[job.plan.handle] = "its guard failed"

    def take_saved(self) -> Saved:
        """Handles whose save ended since the last call, with why nothing was stored, if so."""
        found, self._found = self._found, {}
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
        return Saved(reasons, found)

    @torch.inference_mode()
    def _read(self, job: SaveJob) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, ``[L, H, T, D]`` of this rank."""
        start, end = job.plan.start_token, job.n_tokens
        device = self.layers[0].pages.device
        slots = slots_of(job.blocks, self.block_size, start, end).to(device)
        keys, values = gather_layers(self.layers, slots)
        positions = torch.arange(start, end, device=device)
        return self.rotary.unrotate(keys, positions), values

    def _raw(self, keys: Tensor, values: Tensor) -> KVBatch:
        """Gathered KV ``[L, H, T, D]`` as guards take it; ranks may hold the same heads."""
        heads = int(self.config.num_key_value_heads)
        keys, values = (t[:, :: max(1, t.shape[1] // heads)] for t in (keys, values))
        valid = torch.ones(1, keys.shape[2], dtype=torch.bool, device=keys.device)
        return KVBatch(keys[None].float(), values[None].float(), valid)

    @torch.inference_mode()
    def _scanned(self, job: SaveJob, keys: Tensor, values: Tensor) -> list[tuple[int, int]]:
        """Token ranges of the prompt that the plan's guard hides. Raises ``GuardError``."""
        plan = job.plan
        guard, mask = self.guards[plan.guard], mask_of([plan.forbid], [plan.derive])
        marks = guard.marks(self._raw(keys, values), mask)
        if marks is None:
            raise GuardError(f"guard {plan.guard!r} cannot look for secrets")
        hidden = (marks[0] >= 0).int() - 1
        return [(start, end) for start, end, _ in runs(hidden.tolist())]

    @torch.inference_mode()
    def _guarded(self, job: SaveJob, keys: Tensor, values: Tensor, noise_key: bytes) -> Guarded:
        """The segment through the plan's guard: from the pages where that can be, else from the
        gathered KV ``[L, H, T, D]``, which a guard over several ranks' heads needs."""
        plan = job.plan
        raw, guard = self._raw(keys, values), self.guards[plan.guard]
        mask = mask_of([plan.forbid], [plan.derive])
        if self.world == 1 and has_page_form(guard):
            slots = slots_of(job.blocks, self.block_size, plan.start_token, job.n_tokens)
            return rewrite_pages(
                guard, self.layers, slots.to(keys.device), self.rotary, plan.start_token, mask,
                noise_key, raw,
            )  # fmt: skip
        # the prompt is the twin already: its secrets' places hold neutral tokens
        return guard(raw, mask, keys=[noise_key], twin=raw if guard.needs_twin else None)

    @torch.inference_mode()
    def _commit(self, job: SaveJob, keys: Tensor, values: Tensor) -> None:
        plan, guard = job.plan, self.guards[job.plan.guard]
        digest = guard.digest
        chain = chain_of(plan.content, digest)
        noise_key = self.draws.noise_key(chain, keys, values)
        out = self._guarded(job, keys, values, noise_key)
        fresh = Rows(
            out.kv.keys[0].to(keys.dtype).cpu().contiguous(),
            out.kv.values[0].to(values.dtype).cpu().contiguous(),
        )
        noisy, whole = guard.is_noisy(bool(plan.forbid)), not guard.keeps_tokens

        def store() -> None:
            rows = fresh
            if noisy:
                rows = self.draws.settle(chain, noise_key, fresh.keys, fresh.values, whole)
            segment = KVSegment.create(
                rows.keys,
                rows.values,
                self.config,
                model_id=self.facts.model_id,
                revision=self.facts.revision,
                source_agent=plan.source,
                edge=f"{plan.source}>{plan.audience}",
                hop=plan.hop,
                policy_digest=plan.policy_digest,
                guard_digest=digest,
                draw=rows.draw,
                handle=plan.handle,
                audience=plan.audience,
                expires_at_s=plan.expires_at_s,
                lineage=Lineage(
                    forbid=plan.forbid,
                    derive=plan.derive,
                    origins=plan.origins,
                    raw=type(guard) is FrozenGuard and guard.name == "identity",
                ),
            )
            self.store.put(segment.sign(self.key))
            if noisy:
                self.draws.stored(chain, rows, plan.handle)
            logger.info("lcguard: stored a segment for %s", plan.audience)

        self._saves[plan.handle] = self._puts.submit(store, lambda: self.store.delete(plan.handle))
        self._sweep()

    def _sweep(self) -> None:
        """Expired segments and what crashed writers left go now and then: nobody else asks."""
        if time.monotonic() < self._swept_s + SWEEP_EVERY_S:
            return
        self._swept_s = time.monotonic()

        def sweep() -> None:
            try:
                self.store.sweep()
            except StoreError as error:
                logger.warning("lcguard: the store was not swept: %s", error)

        self._line.submit(sweep)

    def close(self) -> None:
        self._line.close()
        self._puts.close()
        self.store.close()
