"""Segments to pages: what a request consumes is asked of the store, and placed between two steps.

A load that fails ends its own request. Nothing here raises into the engine, nor makes it wait.
"""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from lcguard.manifest import SegmentError
from lcguard.segment import KVSegment
from lcguard.store import SegmentStore
from lcguard.store.line import Call, StoreLine
from lcguard.vllm.jobs import LoadJob
from lcguard.vllm.rank_pages import RankPages
from lcguard.vllm.scanned_prefixes import PrefixCopies

logger = init_logger("vllm.lcguard.loader")


class SegmentLoader:
    """Loads of one rank."""

    def __init__(
        self,
        pages: RankPages,
        prefixes: PrefixCopies,
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
    ) -> None:
        self._pages, self._prefixes = pages, prefixes
        self._store, self._line, self._key = store, line, key
        self._loads: dict[str, tuple[LoadJob, Call[list[KVSegment]]]] = {}
        self._refused: set[str] = set()

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
                segment = self._store.load(wanted.handle, self._key)
                if segment.manifest.hmac != wanted.hmac:
                    raise SegmentError(f"segment {wanted.handle[:6]}... changed since it was asked")
                found.append(segment)
        return found

    @torch.inference_mode()
    def _fill(self, job: LoadJob, segments: list[KVSegment]) -> None:
        n_all = sum(wanted.n_tokens for wanted in job.segments)
        offset = n_all - sum(segment.manifest.n_tokens for segment in segments)
        for segment in segments:
            first = max(offset, job.skip)
            keys, values = (t[:, :, first - offset :] for t in (segment.keys, segment.values))
            self._pages.place(job.blocks, first, keys, values)
            offset += segment.manifest.n_tokens
        if job.prefix:
            start = max(n_all, job.skip)
            self._prefixes.place(job.prefix, job.blocks, n_all, start, job.n_tokens)
