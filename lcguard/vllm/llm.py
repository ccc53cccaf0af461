"""``GuardedLLM``: a ``vllm.LLM`` or ``vllm.AsyncLLM`` whose agents hand over guarded KV.

llm = GuardedLLM.build("my/model", policy="policy.yaml")
handle = llm.publish(agent="intake", prompt=record, audience="billing", secrets=["Ada Long"])
print(llm.generate(agent="billing", prompt=question, consume=[handle]))
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.keys import KEY_VARIABLE, new_key
from lcguard.handoff.redaction import RedactionError, redact
from lcguard.handoff.request import PARAM
from lcguard.model_files import check_readable
from lcguard.token_text import TokenTextError, TokenTexts
from lcguard.vllm.checks import CONNECTOR
from lcguard.vllm.frontend import after_scan, failure_of
from lcguard.vllm.weights import AS_TRANSFORMERS

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Handle:
    """A published segment: what the publisher passes on to the audience, as text or JSON."""

    handle: str
    grant: str
    audience: str
    expires_at_s: int
    n_tokens: int
    guard: str = ""
    forbid: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Handle:
        """Raises ``ValueError`` for a missing field; unknown ones are left out."""
        try:
            return cls(
                str(value["handle"]), str(value["grant"]), str(value["audience"]),
                int(value["expires_at_s"]), int(value["n_tokens"]), str(value.get("guard", "")),
                tuple(value.get("forbid", ())),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"handle lacks {error}: pass what publish returned") from None


def publish_params(
    agent: str, audience: str, policy: Sequence[str] | None = None, ttl_s: float | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The ``publish`` part of a request; see ``lcguard.handoff.request.Publish``."""
    out: dict[str, Any] = {"source": agent, "audience": audience}
    if policy is not None:
        out["forbid"] = list(policy)
    if ttl_s is not None:
        out["ttl_s"] = float(ttl_s)
    if spans is not None:
        out["spans"] = [list(span) for span in spans]
    return out


def consume_params(agent: str, handles: Sequence[Handle]) -> dict[str, Any]:
    """The ``consume`` part of a request."""
    return {
        "agent": agent,
        "segments": [{"handle": h.handle, "grant": h.grant} for h in handles],
    }


def transfer_config(
    store: str,
    policy: str | Path | Mapping[str, Any] | None,
    guards: Mapping[str, str],
    **more: Any,
) -> Any:
    """A ``KVTransferConfig`` with the connector."""
    from vllm.config import KVTransferConfig

    shown = str(policy) if isinstance(policy, Path) else policy
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="lcguard.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"store": store, "policy": shown, "guards": dict(guards), **more},
    )


class _Guarded:
    """What the two wrappers share."""

    def __init__(self, engine: Any) -> None:
        config = (getattr(engine, "llm_engine", None) or engine).vllm_config
        transfer = config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            raise ValueError(
                f"this engine runs without {CONNECTOR}: pass "
                "kv_transfer_config=lcguard.vllm.llm.transfer_config(...) or use build()"
            )
        self.engine = engine

    @staticmethod
    def _parts(
        agent: str, consume: Sequence[Handle], publish: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The handoff of a request; empty for an ordinary one."""
        parts = {"publish": publish} if publish is not None else {}
        return parts | ({"consume": consume_params(agent, consume)} if consume else {})

    def _publishing(
        self, *, agent: str, prompt: Prompt, audience: str, policy: Sequence[str] | None = None,
        ttl_s: float | None = None, spans: Sequence[tuple[int, int]] | None = None,
        secrets: Sequence[str] | None = None, consume: Sequence[Handle] = (),
    ) -> tuple[Any, Any]:  # fmt: skip
        """vLLM's prompt and parameters of a publish. Raises ``HandoffError`` for secrets that
        cannot be covered."""
        if secrets is not None:
            if spans is not None:
                raise HandoffError(400, "secrets and spans both say what to hide: give one")
            prompt, spans = self._covered(prompt, secrets, bool(consume))
        parts = self._parts(agent, consume, publish_params(agent, audience, policy, ttl_s, spans))
        return self._asked(agent, prompt, self._params(None, parts, max_tokens=1))

    def _covered(
        self, prompt: Prompt, secrets: Sequence[str], behind: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The prompt's tokens, and the ranges in which the secrets stand."""
        try:
            texts = self._texts
            ids = self._ids(prompt, behind) if isinstance(prompt, str) else list(prompt)
            found = redact(texts.of(ids), ids, texts.tokenizer, secrets)
        except (TokenTextError, RedactionError) as error:
            raise HandoffError(400, str(error)) from None
        return ids, [(start, end) for start, end in found.spans]

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self.engine.get_tokenizer())

    def _ids(self, prompt: str, behind: bool) -> list[int]:
        """A text behind a consumed segment begins nothing: it gets no BOS token."""
        tokenizer = self.engine.get_tokenizer()
        return list(tokenizer.encode(prompt, add_special_tokens=not behind))

    @staticmethod
    def _params(params: Any, parts: dict[str, Any], max_tokens: int | None = None) -> Any:
        """A copy of the sampling parameters with the handoff; greedy by default."""
        from vllm import SamplingParams

        made = (
            params.clone() if params is not None else SamplingParams(temperature=0, max_tokens=256)
        )
        if max_tokens is not None:
            made.max_tokens = max_tokens
        transfer = dict((made.extra_args or {}).get("kv_transfer_params") or {})
        if parts:
            made.extra_args = {
                **(made.extra_args or {}), "kv_transfer_params": {**transfer, PARAM: parts}
            }  # fmt: skip
        return made

    def _asked(self, agent: str, prompt: Prompt, params: Any) -> tuple[Any, Any]:
        """vLLM's prompt and parameters, in the agent's own part of the prefix cache."""
        parts = (params.extra_args or {}).get("kv_transfer_params", {}).get(PARAM, {})
        made: dict[str, Any]
        if not isinstance(prompt, str):
            made = {"prompt_token_ids": list(prompt)}
        elif "consume" in parts:
            made = {"prompt_token_ids": self._ids(prompt, behind=True)}
        else:
            made = {"prompt": prompt}
        return {**made, "cache_salt": f"lcguard agent {agent}"}, params

    @staticmethod
    def _handle(output: Any) -> Handle:
        answer = (output.kv_transfer_params or {}).get(PARAM)
        if not answer or "handle" not in answer:
            raise HandoffError(400, "the engine answered without a handle: nothing was published")
        return Handle.from_dict(answer)


def _config(
    store: str | None, policy: Any, guards: Mapping[str, str] | None, settings: Mapping[str, Any]
) -> Any:
    if KEY_VARIABLE not in os.environ:
        # a key for this process and its workers: nothing outside has to read these segments
        os.environ[KEY_VARIABLE] = new_key()
    if store is None:
        store = "file://" + tempfile.mkdtemp(prefix="lcguard-")
    return transfer_config(store, policy, guards or {}, **settings)


def _check_model(model: str) -> None:
    """Raises ``ModelFolderError`` for a folder that is damaged, before an engine starts on it."""
    if Path(model).is_dir():
        check_readable(Path(model))


class GuardedLLM(_Guarded):
    """Wraps a ``vllm.LLM`` that was built with ``transfer_config``, or builds one."""

    @classmethod
    def build(
        cls, model: str, *, policy: str | Path | Mapping[str, Any] | None = None,
        guards: Mapping[str, str] | None = None, store: str | None = None,
        settings: Mapping[str, Any] | None = None, **options: Any,
    ) -> GuardedLLM:  # fmt: skip
        """Starts an engine.

        Args:
            policy: file or content; None forbids every category on every edge, with guard
                ``redact``.
            guards: guard name as the policy uses it -> folder, hub repository or ``nano:NAME``.
            store: URL; None keeps segments in a temporary folder.
            settings: further settings of the connector, see ``lcguard.vllm.settings``.
            options: those of ``vllm.LLM``.

        Raises ``ModelFolderError`` for a model folder that is damaged.
        """
        from vllm import LLM

        _check_model(model)
        config = _config(store, policy, guards, settings or {})
        return cls(LLM(model, kv_transfer_config=config, **AS_TRANSFORMERS | options))

    def publish(
        self, *, agent: str, prompt: Prompt, audience: str, policy: Sequence[str] | None = None,
        ttl_s: float | None = None, spans: Sequence[tuple[int, int]] | None = None,
        secrets: Sequence[str] | None = None, consume: Sequence[Handle] = (),
    ) -> Handle:  # fmt: skip
        """Prefills ``prompt`` and stores its guarded KV for ``audience``.

        Args:
            policy: categories to hide beyond those of the engine's policy.
            ttl_s: seconds to live, at most the policy's.
            secrets: for guard ``redact``, texts of the prompt to hide, ``[]`` for none: they are
                covered wherever they stand, in every spelling (``lcguard.handoff.redaction``).
            spans: the same as token ranges of the prompt.
            consume: segments to read first; they are not part of what is published.

        Raises ``HandoffError`` where policy, guard or store refuse, and for a secret that is not
        in the prompt; nothing is stored then.
        """
        return self._handle(self._run(*self._publishing(
            agent=agent, prompt=prompt, audience=audience, policy=policy, ttl_s=ttl_s, spans=spans,
            secrets=secrets, consume=consume,
        )))  # fmt: skip

    def generate(
        self, *, agent: str, prompt: Prompt, consume: Sequence[Handle] = (), params: Any = None
    ) -> str:
        """Text that ``agent`` answers to ``prompt`` after the segments it may consume.

        ``params``: vLLM's ``SamplingParams``; greedy and at most 256 tokens by default. Raises
        ``HandoffError`` for a segment that is missing, expired or not for this agent.
        """
        parts = self._parts(agent, consume)
        out = self._run(*self._asked(agent, prompt, self._params(params, parts)))
        return str(out.outputs[0].text)

    def publish_all(self, requests: Sequence[Mapping[str, Any]]) -> list[Handle]:
        """Several agents at the same time, in one batch: each a mapping of ``publish``'s arguments.

        Raises ``HandoffError`` where any of them is refused; the others' segments then stay until
        they expire.
        """
        asked = [self._publishing(**r) for r in requests]
        return [self._handle(o) for o in self._run_all(asked)]

    def generate_all(self, requests: Sequence[Mapping[str, Any]]) -> list[str]:
        """Several answers at the same time: each a mapping of ``generate``'s arguments."""
        return [str(o.outputs[0].text) for o in self._run_all(
            [self._asked(r["agent"], r["prompt"], self._params(
                r.get("params"), self._parts(r["agent"], r.get("consume", ())))
            ) for r in requests]
        )]  # fmt: skip

    def _run(self, prompt: Any, params: Any) -> Any:
        return self._run_all([(prompt, params)])[0]

    def _run_all(self, requests: Sequence[tuple[Any, Any]]) -> list[Any]:
        from vllm.exceptions import GracefulHTTPError

        prompts = [prompt for prompt, _ in requests]
        try:
            outputs = self.engine.generate(prompts, [p for _, p in requests], use_tqdm=False)
        except GracefulHTTPError as error:
            raise HandoffError(int(error.http_status), error.message) from None
        for output in outputs:
            failure = failure_of(output)
            if failure is not None:
                raise failure
        # prompts in which their guard looked for secrets: once more, without what it found
        again = {
            i: (prompts[i], params)
            for i, output in enumerate(outputs)
            if (params := after_scan(requests[i][1], output)) is not None
        }
        published = self._run_all(list(again.values())) if again else []
        return [*(dict(enumerate(outputs)) | dict(zip(again, published, strict=True))).values()]


class AsyncGuardedLLM(_Guarded):
    """The same over a ``vllm.AsyncLLM``: many agents at once on one engine."""

    @classmethod
    def build(
        cls, model: str, *, policy: str | Path | Mapping[str, Any] | None = None,
        guards: Mapping[str, str] | None = None, store: str | None = None,
        settings: Mapping[str, Any] | None = None, **options: Any,
    ) -> AsyncGuardedLLM:  # fmt: skip
        """As ``GuardedLLM.build``; ``options`` are those of ``AsyncEngineArgs``."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        _check_model(model)
        config = _config(store, policy, guards, settings or {})
        args = AsyncEngineArgs(model=model, kv_transfer_config=config, **AS_TRANSFORMERS | options)
        return cls(AsyncLLM.from_engine_args(args))

    async def publish(
        self, *, agent: str, prompt: Prompt, audience: str, policy: Sequence[str] | None = None,
        ttl_s: float | None = None, spans: Sequence[tuple[int, int]] | None = None,
        secrets: Sequence[str] | None = None, consume: Sequence[Handle] = (),
    ) -> Handle:  # fmt: skip
        """As ``GuardedLLM.publish``."""
        return self._handle(await self._run(*self._publishing(
            agent=agent, prompt=prompt, audience=audience, policy=policy, ttl_s=ttl_s, spans=spans,
            secrets=secrets, consume=consume,
        )))  # fmt: skip

    async def generate(
        self, *, agent: str, prompt: Prompt, consume: Sequence[Handle] = (), params: Any = None
    ) -> str:
        """As ``GuardedLLM.generate``."""
        parts = self._parts(agent, consume)
        out = await self._run(*self._asked(agent, prompt, self._params(params, parts)))
        return str(out.outputs[0].text)

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
