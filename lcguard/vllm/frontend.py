"""A handoff in the process that takes requests: admits it, and prepares its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.grants import new_handle
from lcguard.handoff.redaction import covered
from lcguard.handoff.request import PARAM, SCANNED, EnginePublish, Handoff, tokens_digest
from lcguard.manifest import Manifest, SegmentError
from lcguard.store import SegmentNotFound, StoreError
from lcguard.store.line import StoreLine
from lcguard.vllm import CONNECTOR
from lcguard.vllm.errors import NOT_STORED, StartError
from lcguard.vllm.options import check_params

_LOOK_S = 0.02
"""Between two looks for a segment whose request ended before vLLM said that it was stored."""


class FrontEnd:
    """Checks handoffs against the same store, policy and key as the engine."""

    def __init__(self, gatekeeper: Gatekeeper, line: StoreLine | None = None) -> None:
        self.gatekeeper, self.line = gatekeeper, line or StoreLine(10.0)
        self._found: dict[int, tuple[Manifest, ...]] = {}
        """What requests on their way consume, by the identity of their parameters."""

    @classmethod
    def of(cls, config: Any) -> FrontEnd:
        """For a ``VllmConfig``. Raises ``HandoffError`` (400) for an engine without connector."""
        from vllm import envs

        from lcguard.vllm.setup import gatekeeper_of, settings_of

        transfer = config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            raise HandoffError(400, f"this engine runs without {CONNECTOR}: leave out {PARAM}")
        try:
            keeper = gatekeeper_of(config, not envs.VLLM_ENABLE_V1_MULTIPROCESSING)
            return cls(keeper, StoreLine(settings_of(config).store_timeout_s))
        except StartError as error:
            raise HandoffError(400, f"the handoff is not configured: {error}") from None

    @asynccontextmanager
    async def serving(self, handoff: Handoff, params: Any) -> AsyncIterator[Served]:
        """Around a request's way through an asynchronous engine.

        Raises ``HandoffError`` for segments that it may not consume; the store is asked beside
        the event loop.
        """
        self.gatekeeper.check_origin(handoff)  # before a handle is named that would be given up
        publish = _named(handoff, params)
        if handoff.consume is not None:
            keeper = self.gatekeeper
            try:
                found = await self.line.run(keeper.segments, handoff.consume)
            except StoreError as error:
                raise HandoffError(503, str(error)) from None
            self._found[id(params)] = found
        served = Served(self, publish)
        try:
            yield served
        finally:
            self._found.pop(id(params), None)
            drawn = _drawn(handoff.publish, publish) if not served.finished else ()
            for handle in drawn:
                # its client left, or it failed; the engine may be about to store it. A handle that
                # the request named is not touched: it may be another's
                self.line.submit(partial(self.gatekeeper.store.retire, handle))

    def must_scan(self, handoff: Handoff) -> bool:
        """Whether a publish's guard has yet to look for secrets in the prompt. Raises
        ``HandoffError``."""
        publish = handoff.publish
        if publish is None or publish.scan is not None:
            return False
        return self.gatekeeper.edge(publish).guard in self.gatekeeper.finders

    def own(self, params: Any) -> Any:
        """A request's own copy of its parameters: the caller may use them for others too."""
        copy = params.clone()
        if (found := self._found.pop(id(params), None)) is not None:
            self._found[id(copy)] = found
        return copy

    def admit(self, handoff: Handoff, prompt: Any, params: Any) -> Any:
        """The engine's prompt, with placeholders in front and redacted spans overwritten.

        ``params``: this request's own; its answer is kept within the room there is.

        Raises ``HandoffError`` for whatever the engine would refuse. Without ``serving`` around it
        the store is asked here.
        """
        self.gatekeeper.check_origin(handoff)
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
            raise HandoffError(400, f"a handoff takes a prompt of tokens or text, not {kind!r}")
        check_params(params)
        if handoff.publish is not None and params.stop and _unnamed(handoff.publish):
            # found here, before the engine has said under which handle it stored
            raise HandoffError(
                400,
                "stop: its strings end the answer before the handle is there; leave it out, "
                "or use stop_token_ids",
            )
        ids = list(prompt["prompt_token_ids"])
        facts, n, placed, segments = self.gatekeeper.facts, 0, 0, None
        if handoff.consume is not None:
            segments = self._found.pop(id(params), None)
            if segments is None:
                segments = self.gatekeeper.segments(handoff.consume)
            n = sum(m.n_tokens for m in segments)
            if handoff.consume.placed:
                placed = n
            elif not ids:
                raise HandoffError(400, "the prompt is empty: add at least one token of your own")
        if handoff.publish is not None and handoff.publish.tokens is not None:
            if handoff.publish.tokens != tokens_digest(ids[placed:]):
                raise HandoffError(
                    400,
                    "the engine reads this prompt as other tokens than its spans were counted "
                    "on: leave out what changes the prompt (tool_choice, response_format)",
                )
        if handoff.publish is not None:
            spans = [*(handoff.publish.told or ()), *(handoff.publish.spans or ())]
            guard = self.gatekeeper.edge(handoff.publish).guard if spans else ""
            if guard == "redact" or guard in self.gatekeeper.finders:
                own = ids[placed:]
                inside = [(a, b) for a, b in spans if 0 <= a < b <= len(own)]
                ids[placed:] = covered(own, inside, facts.neutral_id)
        ids = [facts.placeholder_id] * (n - placed) + ids
        plan = self.gatekeeper.plan(
            handoff,
            ids,
            samples=getattr(params, "n", None) or 1,
            segments=segments,
        )
        if segments:
            _bound(params, plan.room_tokens)
        changed = dict(prompt) | {"prompt_token_ids": ids}
        # what was rendered is no longer what is computed
        changed.pop("prompt", None)
        return changed


def _bound(params: Any, room_tokens: int) -> None:
    """Ends the answer where the context would be full if the segments had their shown lengths: at
    its real end the answer's length would tell theirs. Raises ``HandoffError``."""
    if params.min_tokens > room_tokens:
        raise HandoffError(
            400,
            f"min_tokens={params.min_tokens}: there is room for {room_tokens} behind what is "
            "consumed",
        )
    params.max_tokens = min(room_tokens, params.max_tokens or room_tokens)


class Served:
    """One request that the engine answers."""

    def __init__(self, front: FrontEnd, publish: EnginePublish | None) -> None:
        self._front, self._publish = front, publish
        self.finished = False

    async def finish(self, output: Any) -> None:
        """Its last output has come. Raises ``HandoffError`` where the handoff did not come about.

        A stop string ends a request here, unknown to the engine: the store has the last word then.
        """
        error = failure_of(output)
        if error is not None:
            raise error
        if self._publish is not None and not output.kv_transfer_params:
            keeper = self._front.gatekeeper
            stored = [await self._stored(str(one.handle)) for one in self._publish.each()]
            answer = keeper.answer_stored(self._publish, stored)
            output.kv_transfer_params = {PARAM: answer}
        self.finished = True

    async def _stored(self, handle: str) -> Manifest:
        line, store = self._front.line, self._front.gatekeeper.store
        try:
            async with asyncio.timeout(line.timeout_s):
                while True:
                    try:
                        manifest = await line.run(store.manifest, handle)
                        manifest.verify(self._front.gatekeeper.key)
                        return manifest
                    except SegmentNotFound:
                        await asyncio.sleep(_LOOK_S)
        except (TimeoutError, StoreError, SegmentError):
            raise HandoffError(400, NOT_STORED) from None


def _named(handoff: Handoff, params: Any) -> EnginePublish | None:
    """The publish with a handle that this side knows: it may have to be given up. What the proxy
    signed stays as it is: its signature would not fit."""
    publish = handoff.publish
    if publish is None or handoff.order is not None or not _unnamed(publish):
        return publish
    made = publish.named(new_handle)
    also = [one.model_dump(mode="json") for one in made.also]
    transfer = params.extra_args["kv_transfer_params"]
    own = {**transfer[PARAM]["publish"], "handle": made.handle, "also": also}
    params.extra_args = {
        **params.extra_args,
        "kv_transfer_params": {**transfer, PARAM: {**transfer[PARAM], "publish": own}},
    }
    return made


def _drawn(asked: EnginePublish | None, named: EnginePublish | None) -> list[str]:
    """The handles that this side has given the audiences."""
    if asked is None or named is None:
        return []
    both = zip(asked.each(), named.each(), strict=True)
    return [after.handle for before, after in both if before.handle is None and after.handle]


def _unnamed(publish: EnginePublish) -> bool:
    """Whether some audience's handle is still to be drawn."""
    return any(one.handle is None for one in publish.each())


def to_scan(params: Any) -> Any:
    """A request's parameters for the pass in which its guard looks for secrets: its answer is read
    by nobody."""
    from vllm.sampling_params import RequestOutputKind

    made = params.clone()
    made.max_tokens, made.min_tokens, made.stop = 1, 0, []
    made.output_kind = RequestOutputKind.FINAL_ONLY
    return made


def after_scan(params: Any, output: Any) -> Any | None:
    """The parameters with which a prompt is published that its guard has looked for secrets in;
    None where ``output`` is not of such a pass."""
    transfer = output.kv_transfer_params or {}
    scanned = (transfer.get(PARAM) or {}).get(SCANNED)
    if scanned is None:
        return None
    made = params.clone()
    asked = made.extra_args["kv_transfer_params"]
    publish = {**asked[PARAM]["publish"], **scanned}
    made.extra_args = {
        **made.extra_args,
        "kv_transfer_params": {**asked, PARAM: {**asked[PARAM], "publish": publish}},
    }
    return made


def failure_of(output: Any) -> HandoffError | None:
    """Why a finished handoff failed inside the engine; None where it did not."""
    answer = (output.kv_transfer_params or {}).get(PARAM) or {}
    if "error" in answer:
        return HandoffError(int(answer.get("status", 400)), str(answer["error"]))
    if any(o.finish_reason == "error" for o in output.outputs):
        return HandoffError(
            404,
            "a segment could not be loaded: it expired, was revoked or is damaged; the "
            "engine's log says which",
        )
    return None
