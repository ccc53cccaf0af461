"""What this package touches of vLLM: held against the one that is installed at every start, and by
the tests against what was recorded of other versions (``scripts/record_vllm.py``).

vLLM promises none of it. A method of ours that it no longer calls, or calls with something else,
would leave a segment unsaved or a check undone without a word; and a hook of its own that nobody
here knows may be one by which KV leaves. An engine with either does not start.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from types import FunctionType
from typing import Any

from lcguard.vllm import TESTED_VERSIONS
from lcguard.vllm.errors import StartError

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
BASES = (f"{_V1}.base:KVConnectorBase_V1", f"{_V1}.base:SupportsHMA")

OWN: dict[str, tuple[str, ...]] = {
    "requires_kv_delivery": (),
    "has_pending_push_work": (),
    "update_connector_output": ("connector_output",),
    "on_new_request": ("request",),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "request_finished": ("request", "block_ids"),
    "request_finished_all_groups": ("request", "block_ids"),
    "register_kv_caches": ("kv_caches",),
    "start_load_kv": ("forward_context",),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata"),
    "wait_for_save": (),
    "get_transfer_results": ("finished_req_ids",),
    "build_connector_worker_meta": (),
    "shutdown": (),
}
"""The connector's own methods, with the parameters that vLLM gives them."""
LATER: dict[str, tuple[str, ...]] = {"supports_sleep_mode": ("kv_transfer_config",)}
"""As ``OWN``, of vLLM 0.33 on."""
JUDGED = frozenset(
    """
    role get_mem_pool_context bind_connector_metadata clear_connector_metadata
    has_connector_metadata supports_divergent_local_hybrid_hits set_host_xfer_buffer_ops
    finish_forward reset_capture_state handle_preemptions get_finished
    get_block_ids_with_load_errors get_kv_connector_stats get_kv_connector_kv_cache_events
    get_handshake_metadata bind_kv_cache_manager bind_gpu_block_pool get_loaded_kv_cache_group_ids
    get_external_cache_hit_sources register_finished_partial_tail take_events
    has_pending_block_frees get_required_kvcache_layout requires_piecewise_for_cudagraph
    get_finished_count build_kv_connector_stats set_xfer_handshake_metadata
    set_xfer_handshake_metadata_pp_aware build_prom_metrics reset_cache
    unregister_kv_caches restore_kv_caches
    """.split()
)
"""Methods of vLLM's that the connector leaves as they are: they hand out no KV. The last two are
sleep mode's, which it does not support."""

WRAPPED: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        *("request_id", "prompt", "params"),
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("prompt", "sampling_params", "request_id"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        *("scheduler_output", "model_runner_output"),
    ),
    f"{_V1}.multi_connector:MultiConnector.__init__": ("vllm_config", "role", "kv_cache_config"),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("usage_context",),
    "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": ("request", "messages"),
    "vllm.renderers.online_renderer:OnlineRenderer.preprocess_cmpl": ("request", "prompts"),
    "vllm.renderers.base:BaseRenderer.render_chat_async": ("conversations", "chat_params"),
}
"""What ``lcguard.vllm.plugin`` wraps, with its first parameters."""

USED: dict[str, tuple[str, ...]] = {
    BASES[0]: ("_get_connector_metadata", "_vllm_config"),
    f"{_V1}.base:KVConnectorTransferResults": ("finished_recving", "failed_recving"),
    "vllm.v1.request:Request": (
        *("request_id", "prompt_token_ids", "num_prompt_tokens", "num_computed_tokens", "status"),
        *("kv_transfer_params", "sampling_params", "cache_salt", "skip_reading_prefix_cache"),
        *("block_hashes", "update_block_hashes", "prompt_embeds", "mm_features", "lora_request"),
        "resumable",
    ),
    "vllm.v1.request:RequestStatus": ("FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED"),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        *("num_scheduled_tokens", "kv_connector_block_state"),
    ),
    "vllm.v1.engine:EngineCoreOutput": ("request_id", "finish_reason", "kv_transfer_params"),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
}
"""Attributes that are read or set."""

STRUCTS = ("vllm.sampling_params:SamplingParams", "vllm.sampling_params:BeamSearchParams")
"""Whose fields are judged by name."""
_OPENAI = "vllm.entrypoints.openai"
MODELS: dict[str, tuple[str, ...]] = {
    "chat": (f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest",),
    "completions": (f"{_OPENAI}.completion.protocol:CompletionRequest",),
    "responses": (f"{_OPENAI}.responses.protocol:ResponsesRequest",),
    "answer": (
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponse",
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionStreamResponse",
        f"{_OPENAI}.completion.protocol:CompletionResponse",
        f"{_OPENAI}.completion.protocol:CompletionStreamResponse",
    ),
    "choice": (
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponseChoice",
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponseStreamChoice",
        f"{_OPENAI}.completion.protocol:CompletionResponseChoice",
        f"{_OPENAI}.completion.protocol:CompletionResponseStreamChoice",
    ),
    "usage": (f"{_OPENAI}.completion.protocol:UsageInfo",),
    "response": (f"{_OPENAI}.responses.protocol:ResponsesResponse",),
    "response_usage": (f"{_OPENAI}.responses.protocol:ResponseUsage",),
}
"""Of the server: those whose fields ``server/gateway/contract.yaml`` judges."""


_METHODS = (FunctionType, property, classmethod, staticmethod)


@dataclass(frozen=True)
class Interface:
    """One vLLM's, as far as it is touched."""

    connector: Mapping[str, Sequence[str]]
    """Public methods of the base classes, with their parameters."""
    wrapped: Mapping[str, Sequence[str] | None]
    attributes: Mapping[str, Collection[str]]


def faults(found: Interface) -> list[str]:
    """What of it is another than this package was written for; empty where nothing is."""
    out = []
    for name, wanted in (OWN | LATER).items():
        given = found.connector.get(name)
        if given is None and name not in LATER:
            out.append(f"connectors have no method {name}")
        elif given is not None and (*given,) != wanted:
            out.append(f"connectors' {name} is given {', '.join(given) or 'nothing'}")
    known = {*OWN, *LATER, *JUDGED}
    out += [f"connectors have a new method {name}" for name in sorted({*found.connector} - known)]
    for name, wanted in WRAPPED.items():
        given = found.wrapped.get(name)
        if given is None or (*given[: len(wanted)],) != wanted:
            out.append(f"{name.partition(':')[2]} does not take {', '.join(wanted)}")
    for name, wanted in USED.items():
        for missing in sorted({*wanted} - {*found.attributes.get(name, ())}):
            out.append(f"{name.partition(':')[2]} has no {missing}")
    return out


def installed() -> Interface:
    """Of the vLLM that is installed, which it imports."""
    return Interface(
        {
            name: _parameters(getattr(base, name))
            for base in map(resolve_name, BASES)
            for name in vars(base)
            if not name.startswith("_") and isinstance(vars(base)[name], _METHODS)
        },
        {name: _wrapped(name) for name in WRAPPED},
        {name: _attributes(resolve_name(name)) for name in USED},
    )


def check_interface(version: str) -> None:
    """Raises ``StartError`` in one line for a vLLM that is another than this package expects."""
    try:
        wrong = faults(installed())
    except (ImportError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise StartError(
            f"vLLM {version} is not as this release expects: {wrong[0]}{more}: install "
            f"{' or '.join(TESTED_VERSIONS)}"
        )


def _wrapped(name: str) -> tuple[str, ...] | None:
    place, _, method = name.rpartition(".")
    function = getattr(resolve_name(place), method, None)
    return None if function is None else _parameters(function)


def _parameters(value: Any) -> tuple[str, ...]:
    """Without the instance or the class, and without those that stand for any number."""
    if not callable(value):  # a property
        return ()
    kept = inspect.signature(value).parameters.values()
    names = [p.name for p in kept if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(names[1:] if names[:1] == ["self"] else names)


def _attributes(cls: Any) -> set[str]:
    """What the class has, and what its instances are given as they are made."""
    made = getattr(getattr(cls.__init__, "__code__", None), "co_names", ())
    declared = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    return {*dir(cls), *declared, *made}
