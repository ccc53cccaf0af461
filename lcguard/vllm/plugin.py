"""The entry point ``vllm.general_plugins``: registers the connector and its front-end checks.

vLLM loads it in every process. It wraps these methods, each once:

- ``InputProcessor.process_inputs``: checks a handoff before it reaches the engine, so that a
  refusal is an HTTP 400, 403 or 404 with its reason; puts the placeholder tokens before the prompt
  and neutral tokens over spans that ``redact`` hides.
- ``AsyncLLM.generate``: asks the store beside the event loop; passes a prompt twice whose guard
  looks for secrets itself, the second time without them; a handoff that failed inside the
  engine becomes an error as well, and one whose client left leaves no segment.
- ``Scheduler.update_from_output``: the last output of a publish waits for the store.
- ``OnlineRenderer`` and ``BaseRenderer``: what is rendered behind a consumed segment begins no
  conversation of its own (``lcguard.vllm.continuation``).
- ``MultiConnector.__init__``: refuses connectors beside ours, which would save raw KV.
- ``EngineArgs.create_engine_config``: vLLM's own server says in one line what the connector would
  refuse, before it starts an engine.

The engine repeats every check: without this plugin requests still fail closed, less politely.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.request import Handoff, parse_handoff
from lcguard.vllm import CONNECTOR, continuation
from lcguard.vllm.checks import check_siblings
from lcguard.vllm.errors import NOT_STORED, as_http
from lcguard.vllm.frontend import FrontEnd, after_scan, failure_of, to_scan

_MARK = "_lcguard_wrapped"
_front_ends: weakref.WeakKeyDictionary[Any, FrontEnd] = weakref.WeakKeyDictionary()
_opening = threading.Lock()
_OPEN_S = 10.0


def register() -> None:
    """Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "lcguard.vllm.connector", CONNECTOR)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(AsyncLLM, "generate", _generate)
    _wrap(Scheduler, "update_from_output", _update_from_output)
    _wrap(MultiConnector, "__init__", _multi_init)
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(OnlineRenderer, "preprocess_chat", continuation.preprocess_chat)
    _wrap(OnlineRenderer, "preprocess_cmpl", continuation.preprocess_cmpl)
    _wrap(BaseRenderer, "render_chat_async", continuation.render_chat_async)


def _wrap(cls: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(cls, name)
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)


def front_end(processor: Any) -> FrontEnd:
    """Of an ``InputProcessor``. Opens the store at its first use; raises ``HandoffError``."""
    front = _front_ends.get(processor)
    if front is not None:
        return front
    if not _opening.acquire(timeout=_OPEN_S):
        raise HandoffError(503, "the store is still being opened: try again")
    try:
        front = _front_ends.get(processor)
        if front is None:
            front = _front_ends[processor] = FrontEnd.of(processor.vllm_config)
        return front
    finally:
        _opening.release()


def _process_inputs(original: Any) -> Any:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            transfer = _transfer_params(params)
            if not isinstance(transfer, Mapping | None):  # vllm_xargs take any value
                kind = type(transfer).__name__
                raise HandoffError(400, f"kv_transfer_params is a {kind}: give an object")
            handoff = parse_handoff(transfer)
            if handoff is not None:
                front = front_end(self)
                params = front.own(params)
                prompt = front.admit(handoff, prompt, params)
        except HandoffError as error:
            raise as_http(error) from None
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _generate(original: Any) -> Any:
    async def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        try:
            transfer = _transfer_params(sampling_params)
            handoff = parse_handoff(transfer) if isinstance(transfer, Mapping) else None
            if handoff is None:
                async for output in original(self, prompt, sampling_params, *args, **kwargs):
                    yield output
                return
            front = await asyncio.to_thread(front_end, self.input_processor)
            if front.must_scan(handoff):
                sampling_params = await _scanned(
                    original, self, front, handoff, prompt, sampling_params, *args, **kwargs
                )
                handoff = parse_handoff(_transfer_params(sampling_params))
                assert handoff is not None
            async with front.serving(handoff, sampling_params) as served:
                async for output in original(self, prompt, sampling_params, *args, **kwargs):
                    if output.finished:
                        await served.finish(output)
                    yield output
        except HandoffError as error:
            raise as_http(error) from None

    return generate


async def _scanned(
    original: Any,
    engine: Any,
    front: FrontEnd,
    handoff: Handoff,
    prompt: Any,
    params: Any,
    request_id: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A first pass over the prompt, in which the guard looks for secrets and nothing is stored: the
    parameters of the second, which publishes. Raises ``HandoffError``."""
    first, second = to_scan(params), None
    async with front.serving(handoff, first) as served:
        outputs = original(engine, prompt, first, f"{request_id}-scan", *args, **kwargs)
        async for output in outputs:
            if output.finished:
                failure = failure_of(output)
                if failure is not None:
                    raise failure
                second = after_scan(params, output)
        served.finished = second is not None
    if second is None:
        raise HandoffError(400, NOT_STORED)
    return second


def _update_from_output(original: Any) -> Any:
    from lcguard.vllm.deferred_outputs import DeferredOutputs

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        deferred = getattr(getattr(self.connector, "scheduler", None), "deferred", None)
        return deferred.pass_on(outputs) if isinstance(deferred, DeferredOutputs) else outputs

    return update_from_output


def _multi_init(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        check_siblings([c.get("kv_connector", "") for c in extra.get("connectors", [])])
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _create_engine_config(original: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext

    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = original(self, usage_context, *args, **kwargs)
        ours = getattr(config.kv_transfer_config, "kv_connector", None) == CONNECTOR
        # a library's caller gets the exception, from the connector or from GuardedLLM
        if ours and usage_context == UsageContext.OPENAI_API_SERVER:
            from lcguard.vllm.preflight import check_engine

            try:
                check_engine(config)
            except ValueError as error:
                raise SystemExit(f"lcguard: {error}") from None
        return config

    return create_engine_config


def _transfer_params(params: Any) -> Any:
    extra = getattr(params, "extra_args", None) or {}
    return extra.get("kv_transfer_params")
