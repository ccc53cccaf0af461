"""The connector's half in a worker: pages to guarded segment, and segment to pages.

Pages are read and written in bulk around the forward pass, on the tensors that vLLM registered, so
this needs no layer hooks and works under full CUDA graphs. The store is asked beside it: its answer
is looked for after each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from vllm.logger import init_logger

from lcguard.guards.frozen import FrozenGuard
from lcguard.handoff.plan import ModelFacts
from lcguard.rope import Rotary
from lcguard.store import SegmentStore, StoreError
from lcguard.store.line import StoreLine
from lcguard.vllm.jobs import StepJobs
from lcguard.vllm.live_guards import LiveGuards, Load
from lcguard.vllm.loader import SegmentLoader
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.rank_pages import RankPages
from lcguard.vllm.saver import SegmentSaver
from lcguard.vllm.scanned_prefixes import PrefixCopies
from lcguard.vllm.selfcheck import check_rewriting

logger = init_logger("vllm.lcguard.worker")
SWEEP_EVERY_S = 60.0


class HandoffWorker:
    """Worker side of one rank; see ``SegmentSaver`` for ``gather_heads``."""

    def __init__(
        self,
        config: Any,
        facts: ModelFacts,
        guards: Mapping[str, FrozenGuard],
        store: SegmentStore,
        line: StoreLine,
        key: bytes,
        *,
        block_size: int,
        rank: int = 0,
        world: int = 1,
        gather_heads: Callable[[Tensor], Tensor] = lambda x: x,
        follow: Mapping[str, str] | None = None,
        load: Load | None = None,
    ) -> None:
        """
        Args:
            follow: folders of guards by name; those of registries are followed.
            load: reads a guard for this engine's model.
        """
        self.guards, self.store, self._line = dict(guards), store, line
        self.pages = RankPages(Rotary.from_config(config), block_size, rank, world)
        self.prefixes = PrefixCopies(self.pages)
        self.loader = SegmentLoader(self.pages, self.prefixes, store, line, key)
        self.saver = SegmentSaver(
            config,
            facts,
            self.guards,
            self.pages,
            self.prefixes,
            store,
            key,
            timeout_s=line.timeout_s,
            gather_heads=gather_heads,
        )
        self.live: LiveGuards | None = None
        if rank == 0 and follow and load is not None:  # the first rank alone guards
            self.live = LiveGuards(self.guards, follow, key, load, self._check, line)
        self._swept_s = 0.0

    def register(self, layers: list[LayerPages]) -> None:
        """Takes the engine's pages, in layer order, and proves that it reads and guards them
        right."""
        for layer in layers:
            layer.probe()
        self.pages.layers = layers
        self._check(self.guards)

    def _check(self, guards: Mapping[str, FrozenGuard]) -> None:
        """Raises ``StartError`` for a guard that these pages would be rewritten wrong by."""
        if self.pages.world == 1:  # several ranks rewrite with the guards' modules
            check_rewriting(guards, self.pages.layers, self.pages.rotary)

    def load(self, jobs: StepJobs) -> None:
        """Before a forward pass: asks for what its requests consume."""
        self.prefixes.drop(jobs.drop)
        for job in jobs.loads:
            self.loader.load(job)

    def save(self, jobs: StepJobs) -> None:
        """After a forward pass: guards what its requests publish, and has it stored."""
        if self.live is not None:
            self.live.look()
        for job in jobs.saves:
            self.saver.save(job)
        if jobs.saves and self.pages.rank == 0:
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
        self.saver.close()
        self.store.close()
