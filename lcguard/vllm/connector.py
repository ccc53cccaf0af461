"""``LCGuardConnector``: guarded KV handoff as a KV connector of stock vLLM.

    KVTransferConfig(kv_connector="LCGuardConnector", kv_role="kv_both",
                     kv_connector_module_path="lcguard.vllm.connector",
                     kv_connector_extra_config={"store": "file:///var/lib/lcguard"})

A *publish* request saves its guarded prompt under a handle; a *consume* request starts with
placeholder tokens that count as computed elsewhere and are filled with the segments. This class
only routes: ``scheduler`` plans, ``worker`` reads and writes, ``gatekeeper`` decides.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform

from lcguard.store.line import StoreLine
from lcguard.vllm import plugin
from lcguard.vllm.checks import check_config, check_groups, check_installed
from lcguard.vllm.jobs import SaveResults, StepJobs
from lcguard.vllm.pages import LayerPages
from lcguard.vllm.scheduler import IDLE_S, HandoffScheduler
from lcguard.vllm.seeded_sampling import patch_seeded_sampling
from lcguard.vllm.setup import (
    facts_of,
    gatekeeper_of,
    guards_of,
    key_of,
    saved_guard_for,
    settings_of,
    store_of,
)
from lcguard.vllm.worker import HandoffWorker

logger = init_logger("vllm.lcguard")
plugin.register()  # also where the entry point was not loaded


class LCGuardConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Raises ``StartError`` for an engine that could not keep its promises."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = settings_of(vllm_config)
        check_installed(settings.untested_vllm)
        check_config(vllm_config)
        check_groups(kv_cache_config)
        if settings.untested_vllm:
            logger.warning("lcguard: untested_vllm lets vLLM %s in", settings.untested_vllm)
        one_process = not envs.VLLM_ENABLE_V1_MULTIPROCESSING and (
            vllm_config.parallel_config.world_size == 1
        )
        self.scheduler: HandoffScheduler | None = None
        self.worker: HandoffWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = HandoffScheduler(
                gatekeeper_of(vllm_config, one_process), StoreLine(settings.store_timeout_s)
            )
            return
        if current_platform.is_cpu():
            from vllm.v1.worker.cpu_model_runner import CPUModelRunner

            patch_seeded_sampling(CPUModelRunner)
        facts = facts_of(vllm_config, settings)
        world = vllm_config.parallel_config.tensor_parallel_size
        self.worker = HandoffWorker(
            vllm_config.model_config.hf_text_config,
            facts,
            guards_of(vllm_config, settings, facts),
            store_of(settings, one_process),
            StoreLine(settings.store_timeout_s),
            key_of(),
            block_size=vllm_config.cache_config.block_size,
            rank=_tensor_rank() if world > 1 else 0,
            world=world,
            gather_heads=_gather_heads if world > 1 else lambda x: x,
            follow=settings.guards,
            load=partial(saved_guard_for, vllm_config, facts),
        )

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """False (vLLM 0.33 asks): nothing shows that pages and weights are the same ones after it,
        to which the worker's views of them and the guards are bound."""
        return False

    # -- scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a segment is read off its pages when its step ends, preemption loses nothing."""
        return False

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping while a publish waits for the store."""
        return self.scheduler is not None and self.scheduler.deferred.pending

    def update_connector_output(self, connector_output: Any) -> None:
        assert self.scheduler is not None
        if isinstance(saved := connector_output.kv_connector_worker_meta, SaveResults):
            self.scheduler.deferred.take(saved)

    def on_new_request(self, request: Any) -> None:
        assert self.scheduler is not None
        self.scheduler.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        return self.scheduler.external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self.scheduler is not None
        return self.scheduler.step(scheduler_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler is not None
        return False, self.scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # -- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self.worker is not None
        context = self._vllm_config.compilation_config.static_forward_context
        names = sorted(kv_caches, key=_layer_index)
        self.worker.register([LayerPages(n, context[n], kv_caches[n]) for n in names])
        pages = kv_caches[names[0]]
        logger.info("lcguard: %d layers of %s %s", len(names), tuple(pages.shape), pages.dtype)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.worker is not None
        jobs = self._jobs()
        self.worker.load(jobs)
        if jobs.idle:
            # a worker of its own process that polls for steps, on the core that it is bound to,
            # never leaves its store's threads the interpreter lock
            time.sleep(IDLE_S)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request is scheduled once its load is complete."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Saves happen in bulk, after the forward pass."""

    def wait_for_save(self) -> None:
        assert self.worker is not None
        self.worker.save(self._jobs())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self.worker is not None
        done, failed = self.worker.loader.take_loaded()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self.worker is not None
        saved = self.worker.saver.take_saved()
        return saved if saved.reasons else None

    def shutdown(self) -> None:
        for half in (self.scheduler, self.worker):
            if half is not None:
                half.close()

    def _jobs(self) -> StepJobs:
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, StepJobs)
        return jobs


def _layer_index(name: str) -> int:
    """The layer's number in a name such as ``model.layers.3.self_attn.attn``."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _gather_heads(tensor: torch.Tensor) -> torch.Tensor:
    """``[L, h, T, D]`` of each rank to ``[L, h * ranks, T, D]`` on all of them."""
    from vllm.distributed import tensor_model_parallel_all_gather

    gathered: torch.Tensor = tensor_model_parallel_all_gather(tensor.contiguous(), dim=1)
    return gathered
