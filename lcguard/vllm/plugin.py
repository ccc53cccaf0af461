"""The entry point ``vllm.general_plugins``: registers the connector and its front-end checks.

vLLM loads it in every process. It wraps these methods, each once:

- ``InputProcessor.process_inputs``: checks a handoff before it reaches the engine, so that a
  refusal is an HTTP 400, 403 or 404 with its reason; puts the placeholder tokens before the prompt
  and neutral tokens over spans that ``redact`` hides.
- ``AsyncLLM.generate``: a handoff that failed inside the engine becomes an error as well.
- ``OnlineRenderer`` and ``BaseRenderer``: what is rendered behind a consumed segment begins no
  conversation of its own (``lcguard.vllm.continuation``).
- ``MultiConnector.__init__``: refuses connectors beside ours, which would save raw KV.

The engine repeats every check: without this plugin requests still fail closed, less politely.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from lcguard.vllm import continuation
from lcguard.vllm.checks import CONNECTOR, check_siblings
from lcguard.vllm.errors import HandoffError, as_http
from lcguard.vllm.frontend import FrontEnd, failure_of
from lcguard.vllm.request import PARAM, parse_handoff

_MARK = "_lcguard_wrapped"
_front_ends: weakref.WeakKeyDictionary[Any, FrontEnd | None] = weakref.WeakKeyDictionary()


def register() -> None:
    """Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "lcguard.vllm.connector", CONNECTOR)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(AsyncLLM, "generate", _generate)
    _wrap(MultiConnector, "__init__", _multi_init)
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
                front = _front_ends.get(self)
                if front is None:
                    front = _front_ends[self] = FrontEnd.of(self.vllm_config)
                params = params.clone()  # the caller may use it for other requests too
                prompt = front.admit(handoff, prompt, params)
        except HandoffError as error:
            raise as_http(error) from None
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _generate(original: Any) -> Any:
    async def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        transfer = _transfer_params(sampling_params)
        watched = isinstance(transfer, Mapping) and PARAM in transfer
        async for output in original(self, prompt, sampling_params, *args, **kwargs):
            if watched and output.finished:
                error = failure_of(output)
                if error is not None:
                    raise as_http(error)
            yield output

    return generate


def _multi_init(original: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        check_siblings([c.get("kv_connector", "") for c in extra.get("connectors", [])])
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _transfer_params(params: Any) -> Any:
    extra = getattr(params, "extra_args", None) or {}
    return extra.get("kv_transfer_params")
