"""The connector's half in a worker: pages to guarded segment, and segment to pages.

Loading and saving run in bulk around the forward pass, on the tensors that vLLM registered, so
they need no layer hooks and work under full CUDA graphs. A failed load ends its own request; a
failed save stores nothing. Neither ever raises into the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from lcguard.guards.frozen import FrozenGuard, GuardError
from lcguard.manifest import Lineage, SegmentError
from lcguard.protocols import Guarded, KVBatch
from lcguard.records import mask_of
from lcguard.rope import Rotary
from lcguard.segment import KVSegment
from lcguard.store import SegmentStore, StoreError
from lcguard.vllm.draws import Draws, Rows, chain_of
from lcguard.vllm.gatekeeper import ModelFacts
from lcguard.vllm.jobs import LoadJob, SaveJob
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
        store: SegmentStore, key: bytes, *, block_size: int, rank: int = 0, world: int = 1,
        gather_heads: Callable[[Tensor], Tensor] = lambda x: x, load_async: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.facts, self.guards = config, facts, dict(guards)
        self.store, self.key, self.block_size = store, key, block_size
        self.rank, self.world, self.gather_heads = rank, world, gather_heads
        self.draws = Draws(key, store)
        self.rotary = Rotary.from_config(config)
        self.layers: list[LayerPages] = []
        self._bad_blocks: set[int] = set()
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._lock = threading.Lock()
        self._swept_s = 0.0
        self._pool = ThreadPoolExecutor(1, "lcguard-load") if load_async else None

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
        """Fills the request's first tokens, now or beside the forward pass."""
        if self._pool is not None:
            self._pool.submit(self._load_beside, job)
        elif not self._try_load(job):
            first, last = job.skip // self.block_size, -(-job.n_tokens // self.block_size)
            self._bad_blocks |= set(job.blocks[first:last])

    def _load_beside(self, job: LoadJob) -> None:
        done = self._try_load(job)
        with self._lock:
            self._done.add(job.request_id)
            if not done:
                self._failed.add(job.request_id)

    def _try_load(self, job: LoadJob) -> bool:
        try:
            if job.failure:
                raise SegmentError(job.failure)
            self._fill(job)
        except Exception as error:
            logger.error("lcguard: request %s gets no KV: %s", job.request_id, error)
            return False
        return True

    @torch.inference_mode()
    def _fill(self, job: LoadJob) -> None:
        offset = 0
        for wanted in job.segments:
            end = offset + wanted.n_tokens
            first = max(offset, job.skip)
            if first < end:
                segment = self.store.load(wanted.handle, self.key)
                if segment.manifest.hmac != wanted.hmac:
                    raise SegmentError(f"segment {wanted.handle[:6]}... changed since it was asked")
                self._place(segment, job.blocks, offset, first)
            offset = end

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
            return
        keys, values = self.gather_heads(keys), self.gather_heads(values)
        if self.rank != 0:
            return
        try:
            self._commit(job, keys, values)
        except Exception as error:
            known = isinstance(error, SegmentError | GuardError)
            log = logger.error if known else logger.exception
            log("lcguard: request %s publishes nothing: %s", job.request_id, error)

    @torch.inference_mode()
    def _read(self, job: SaveJob) -> tuple[Tensor, Tensor]:
        """Un-rotated keys, and values, ``[L, H, T, D]`` of this rank."""
        start, end = job.plan.start_token, job.n_tokens
        device = self.layers[0].pages.device
        slots = slots_of(job.blocks, self.block_size, start, end).to(device)
        keys, values = gather_layers(self.layers, slots)
        positions = torch.arange(start, end, device=device)
        return self.rotary.unrotate(keys, positions), values

    @torch.inference_mode()
    def _guarded(self, job: SaveJob, keys: Tensor, values: Tensor, noise_key: bytes) -> Guarded:
        """The segment through the plan's guard: from the pages where that can be, else from the
        gathered KV ``[L, H, T, D]``, which a guard over several ranks' heads needs."""
        plan = job.plan
        heads = int(self.config.num_key_value_heads)
        keys, values = (t[:, :: max(1, t.shape[1] // heads)] for t in (keys, values))
        valid = torch.ones(1, keys.shape[2], dtype=torch.bool, device=keys.device)
        raw = KVBatch(keys[None].float(), values[None].float(), valid)
        guard = self.guards[plan.guard]
        mask = mask_of([plan.forbid], [plan.derive])
        if self.world == 1 and has_page_form(guard):
            slots = slots_of(job.blocks, self.block_size, plan.start_token, job.n_tokens)
            return rewrite_pages(
                guard, self.layers, slots.to(keys.device), self.rotary, plan.start_token, mask,
                noise_key, raw,
            )  # fmt: skip
        # with redact, the prompt is the twin already: its spans hold neutral tokens
        return guard(raw, mask, keys=[noise_key], twin=raw if guard.needs_twin else None)

    @torch.inference_mode()
    def _commit(self, job: SaveJob, keys: Tensor, values: Tensor) -> None:
        plan, guard = job.plan, self.guards[job.plan.guard]
        digest = guard.digest
        chain = chain_of(plan.content, digest)
        noise_key = self.draws.noise_key(chain, keys, values)
        out = self._guarded(job, keys, values, noise_key)
        rows = Rows(
            out.kv.keys[0].to(keys.dtype).cpu().contiguous(),
            out.kv.values[0].to(values.dtype).cpu().contiguous(),
        )
        if noisy := guard.is_noisy(bool(plan.forbid)):
            whole = not guard.keeps_tokens
            rows = self.draws.settle(chain, noise_key, rows.keys, rows.values, whole)
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
        self._sweep()
        logger.info("lcguard: stored a segment for %s", plan.audience)

    def _sweep(self) -> None:
        """Expired segments and what crashed writers left go now and then: nobody else asks."""
        if time.monotonic() < self._swept_s + SWEEP_EVERY_S:
            return
        self._swept_s = time.monotonic()
        try:
            self.store.sweep()
        except StoreError as error:
            logger.warning("lcguard: the store was not swept: %s", error)

    # -- what the engine asks after a step

    def take_bad_blocks(self) -> set[int]:
        """Blocks of failed loads since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_loaded(self) -> tuple[set[str], set[str]]:
        """Requests whose load beside the forward pass ended, and those of them that failed."""
        with self._lock:
            done, failed = self._done, self._failed
            self._done, self._failed = set(), set()
        return done, failed

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self.store.close()
