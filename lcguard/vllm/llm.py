"""``GuardedLLM``: a ``vllm.LLM`` or ``vllm.AsyncLLM`` whose agents hand over guarded KV.

llm = GuardedLLM.build("my/model", policy="policy.yaml")
handle = llm.publish(agent="intake", prompt=record, audience="billing", secrets=["Ada Long"])
print(llm.generate(agent="billing", prompt=question, consume=[handle]))
"""

from __future__ import annotations

import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict, Unpack, overload

from lcguard.custom_categories import CustomCategory
from lcguard.detokenize import TokenTextError, TokenTexts
from lcguard.guards.standing import check_proven
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.handle import Handle, consume_params, handles_of, publish_params
from lcguard.handoff.keys import KEY_VARIABLE, new_key
from lcguard.handoff.names import split_tenant
from lcguard.handoff.policy import Edge
from lcguard.handoff.redaction import RedactionError, redact
from lcguard.handoff.request import PARAM, parse_handoff
from lcguard.model_files import AS_TRANSFORMERS
from lcguard.vllm import CONNECTOR
from lcguard.vllm.checks import check_installed, check_version, installed_version
from lcguard.vllm.frontend import after_scan, failure_of
from lcguard.vllm.plugin import front_end
from lcguard.vllm.preflight import check_start
from lcguard.vllm.settings import extra_config, policy_of, read_settings, transfer_config

Prompt = str | Sequence[int]
Call = tuple[Any, Any]
"""vLLM's prompt and ``SamplingParams``."""


class _Publish(TypedDict):
    agent: str
    prompt: Prompt
    policy: NotRequired[Sequence[str] | None]
    """Categories to hide beyond those of the engine's policy."""
    ttl_s: NotRequired[float | None]
    """Seconds to live, at most the policy's."""
    secrets: NotRequired[Sequence[str] | None]
    """For guard ``redact``, texts of the prompt to hide, ``[]`` for none: they are covered wherever
    they stand, in every spelling (``lcguard.handoff.redaction``)."""
    spans: NotRequired[Sequence[tuple[int, int]] | None]
    """The same as token ranges of the prompt."""
    consume: NotRequired[Sequence[Handle]]
    """Segments to read first; they are not part of what is published."""


class PublishRequest(_Publish):
    """The arguments of ``publish``."""

    audience: str


class SeveralRequest(_Publish):
    """The arguments of ``publish`` for several audiences: one guard pass under all their rules, one
    draw of noise, and a handle for each (``lcguard.handoff.audiences``)."""

    audience: list[str] | tuple[str, ...]


class GenerateRequest(TypedDict):
    """The arguments of ``generate``."""

    agent: str
    prompt: Prompt
    consume: NotRequired[Sequence[Handle]]
    params: NotRequired[Any]
    """vLLM's ``SamplingParams``; greedy and at most 256 tokens by default."""


class _GuardedEngine(ABC):
    """What the two wrappers share: how an engine is started, and what it is asked."""

    def __init__(self, engine: Any) -> None:
        config = (getattr(engine, "llm_engine", None) or engine).vllm_config
        transfer = config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            raise ValueError(
                f"this engine runs without {CONNECTOR}: pass "
                "kv_transfer_config=lcguard.vllm.settings.transfer_config(...) or use build()"
            )
        self.engine = engine

    @classmethod
    def build(
        cls,
        model: str,
        *,
        policy: str | Path | Mapping[str, Any] | None = None,
        guards: Mapping[str, str] | None = None,
        store: str | None = None,
        settings: Mapping[str, Any] | None = None,
        unproven: Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Starts an engine.

        Args:
            policy: file or content; None forbids every category on every edge, with guard
                ``redact``.
            guards: guard name as the policy uses it -> folder, hub repository or ``nano:NAME``.
            store: URL; None keeps segments in a temporary folder.
            settings: further settings of the connector, see ``lcguard.vllm.settings``.
            unproven: names of guards that are served though nothing was measured of them, or that
                they leak; others of that kind are refused.
            options: those of ``vllm.LLM``, or of ``AsyncEngineArgs``.

        Raises ``StartError`` in one line, before vLLM loads anything, for a policy, guard, key or
        model that cannot be served, and ``ModelFolderError`` for a model folder that is damaged.
        """
        if KEY_VARIABLE not in os.environ:
            # a key for this process and its workers: nothing outside has to read these segments
            os.environ[KEY_VARIABLE] = new_key()
        if store is None:
            store = "file://" + tempfile.mkdtemp(prefix="lcguard-")
        found = read_settings(extra_config(store, policy, guards or {}, **settings or {}))
        policy_of(found)
        if (engine := installed_version()) is not None:
            check_version(engine[1], found.untested_vllm)
        own = not options.get("skip_tokenizer_init") and "tokenizer" not in options
        check_start(model, found.guards, tokenizer=own)
        check_proven(found.guards, unproven, "unproven=[{!r}]")
        config = transfer_config(store, policy, guards or {}, **settings or {})
        check_installed(found.untested_vllm)
        return cls(cls._start(model=model, kv_transfer_config=config, **AS_TRANSFORMERS | options))

    @staticmethod
    @abstractmethod
    def _start(**options: Any) -> Any:
        """vLLM's engine with these options."""

    def _publishing(
        self,
        *,
        agent: str,
        prompt: Prompt,
        audience: str | Sequence[str],
        policy: Sequence[str] | None = None,
        ttl_s: float | None = None,
        secrets: Sequence[str] | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        consume: Sequence[Handle] = (),
    ) -> Call:
        """What the engine is asked for a ``PublishRequest`` or a ``SeveralRequest``. Raises
        ``HandoffError`` for secrets that cannot be covered."""
        if secrets is not None and spans is not None:
            raise HandoffError(400, "secrets and spans both say what to hide: give one")
        parts = {"publish": publish_params(agent, audience, policy, ttl_s, spans)}
        if consume:
            parts["consume"] = consume_params(agent, consume)
        edge = self._edge_with_custom(agent, parts)
        if secrets is not None or edge is not None:
            custom = edge.custom if edge else {}
            prompt, found = self._covered(prompt, secrets or (), bool(consume), custom)
            parts["publish"] |= _told(edge, found, spans, secrets is not None)
        return self._call(agent, prompt, parts, max_tokens=1)

    def _edge_with_custom(self, agent: str, parts: Mapping[str, Any]) -> Edge | None:
        """The rule of a publish, what it consumes included, where it forbids categories that the
        policy defines itself. Raises ``HandoffError``."""
        engine = getattr(self.engine, "llm_engine", None) or self.engine
        keeper = front_end(engine.input_processor).gatekeeper
        if not keeper.policy.custom_of(split_tenant(agent)[0]):
            return None
        asked = parse_handoff({PARAM: parts})
        assert asked is not None
        assert asked.publish is not None
        consumed = keeper.segments(asked.consume) if asked.consume else ()
        edge = keeper.edge(asked.publish, consumed)
        return edge if edge.custom else None

    def _generating(
        self, *, agent: str, prompt: Prompt, consume: Sequence[Handle] = (), params: Any = None
    ) -> Call:
        """What the engine is asked for a ``GenerateRequest``."""
        parts = {"consume": consume_params(agent, consume)} if consume else {}
        return self._call(agent, prompt, parts, params)

    def _covered(
        self,
        prompt: Prompt,
        secrets: Sequence[str],
        behind: bool,
        custom: Mapping[str, CustomCategory],
    ) -> tuple[list[int], list[list[int]]]:
        """The prompt's tokens, and the ranges in which the secrets stand, and what belongs to
        ``custom``."""
        try:
            texts = self._texts
            ids = self._ids(prompt, behind) if isinstance(prompt, str) else list(prompt)
            found = redact(texts.of(ids), ids, texts.tokenizer, secrets, custom=custom)
        except (TokenTextError, RedactionError) as error:
            raise HandoffError(400, str(error)) from None
        return ids, found.spans

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self.engine.get_tokenizer())

    def _ids(self, prompt: str, behind: bool) -> list[int]:
        """A text behind a consumed segment begins nothing: it gets no BOS token."""
        tokenizer = self.engine.get_tokenizer()
        return list(tokenizer.encode(prompt, add_special_tokens=not behind))

    def _call(
        self,
        agent: str,
        prompt: Prompt,
        parts: Mapping[str, Any],
        params: Any = None,
        max_tokens: int | None = None,
    ) -> Call:
        """Asks in the agent's own part of the prefix cache, with the handoff's ``parts``."""
        from vllm import SamplingParams

        if params is None:
            made = SamplingParams(temperature=0, max_tokens=256)
        else:
            made = params.clone()
        if max_tokens is not None:
            made.max_tokens = max_tokens
        extra = dict(made.extra_args or {})
        transfer = dict(extra.get("kv_transfer_params") or {})
        if parts:
            transfer[PARAM] = dict(parts)
            made.extra_args = extra | {"kv_transfer_params": transfer}
        asked: dict[str, Any]
        if not isinstance(prompt, str):
            asked = {"prompt_token_ids": list(prompt)}
        elif "consume" in transfer.get(PARAM, {}):
            asked = {"prompt_token_ids": self._ids(prompt, behind=True)}
        else:
            asked = {"prompt": prompt}
        return asked | {"cache_salt": f"lcguard agent {agent}"}, made

    @staticmethod
    def _handles(output: Any) -> list[Handle]:
        """One for each audience."""
        answer = (output.kv_transfer_params or {}).get(PARAM)
        if not answer or "handle" not in answer:
            raise HandoffError(400, "the engine answered without a handle: nothing was published")
        return handles_of(answer)


def _told(
    edge: Edge | None,
    found: list[list[int]],
    spans: Sequence[tuple[int, int]] | None,
    named: bool,
) -> dict[str, Any]:
    """What a publish says of the ranges that were ``found``. ``edge``: one that forbids own
    categories; ``named``: whether its publisher named secrets."""
    if edge is None:
        return {"spans": found}
    looked_for = {"looked_for": edge.definitions}
    if edge.guard != "redact":
        return looked_for | {"told": found} | ({"spans": found} if named else {})
    # who forbids more has to name it: without spans the engine says so
    if named or spans is not None or {*edge.forbid} == {*edge.custom}:
        return looked_for | {"spans": [*found, *(list(span) for span in spans or ())]}
    return looked_for


def _as_asked(audience: str | Sequence[str], handles: list[Handle]) -> Handle | list[Handle]:
    return handles[0] if isinstance(audience, str) else handles


class GuardedLLM(_GuardedEngine):
    """Wraps a ``vllm.LLM`` that was built with ``transfer_config``, or builds one."""

    @staticmethod
    def _start(**options: Any) -> Any:
        from vllm import LLM

        return LLM(**options)

    @overload
    def publish(self, **request: Unpack[PublishRequest]) -> Handle: ...
    @overload
    def publish(self, **request: Unpack[SeveralRequest]) -> list[Handle]: ...
    def publish(self, **request: Any) -> Handle | list[Handle]:
        """Prefills ``prompt`` and stores its guarded KV for ``audience``; see ``PublishRequest``.
        For a list of audiences (``SeveralRequest``) a handle for each, in their order.

        Raises ``HandoffError`` where policy, guard or store refuse, and for a secret that is not
        in the prompt; nothing is stored then.
        """
        (output,) = self._run([self._publishing(**request)])
        return _as_asked(request["audience"], self._handles(output))

    def generate(self, **request: Unpack[GenerateRequest]) -> str:
        """Text that ``agent`` answers to ``prompt`` after the segments it may consume.

        Raises ``HandoffError`` for a segment that is missing, expired or not for this agent.
        """
        return self.generate_all([request])[0]

    def publish_all(self, requests: Sequence[PublishRequest]) -> list[Handle]:
        """Several agents at the same time, in one batch.

        Raises ``HandoffError`` where any of them is refused; the others' segments then stay until
        they expire.
        """
        outputs = self._run([self._publishing(**r) for r in requests])
        return [self._handles(output)[0] for output in outputs]

    def generate_all(self, requests: Sequence[GenerateRequest]) -> list[str]:
        """Several answers at the same time."""
        outputs = self._run([self._generating(**request) for request in requests])
        return [str(output.outputs[0].text) for output in outputs]

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        from vllm.exceptions import GracefulHTTPError

        prompts, params = [prompt for prompt, _ in calls], [params for _, params in calls]
        try:
            outputs = self.engine.generate(prompts, params, use_tqdm=False)
        except GracefulHTTPError as error:
            raise HandoffError(int(error.http_status), error.message) from None
        for output in outputs:
            if (failure := failure_of(output)) is not None:
                raise failure
        # prompts in which their guard looked for secrets: once more, without what it found
        again = {
            i: (prompts[i], after)
            for i, output in enumerate(outputs)
            if (after := after_scan(params[i], output)) is not None
        }
        published = self._run(list(again.values())) if again else []
        return [*(dict(enumerate(outputs)) | dict(zip(again, published, strict=True))).values()]


class AsyncGuardedLLM(_GuardedEngine):
    """The same over a ``vllm.AsyncLLM``: many agents at once on one engine."""

    @staticmethod
    def _start(**options: Any) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    @overload
    async def publish(self, **request: Unpack[PublishRequest]) -> Handle: ...
    @overload
    async def publish(self, **request: Unpack[SeveralRequest]) -> list[Handle]: ...
    async def publish(self, **request: Any) -> Handle | list[Handle]:
        """As ``GuardedLLM.publish``."""
        handles = self._handles(await self._run(*self._publishing(**request)))
        return _as_asked(request["audience"], handles)

    async def generate(self, **request: Unpack[GenerateRequest]) -> str:
        """As ``GuardedLLM.generate``."""
        return str((await self._run(*self._generating(**request))).outputs[0].text)

    async def _run(self, prompt: Any, params: Any) -> Any:
        from vllm.exceptions import GracefulHTTPError

        output: Any = None
        try:
            async for latest in self.engine.generate(prompt, params, f"lcguard-{uuid.uuid4().hex}"):
                output = latest
        except GracefulHTTPError as error:
            raise HandoffError(int(error.http_status), error.message) from None
        if output is None:
            raise HandoffError(400, "the engine answered nothing")
        return output
