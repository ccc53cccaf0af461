"""A handoff in the process that takes requests: admits it, and prepares its prompt."""

from __future__ import annotations

from typing import Any

from lcguard.vllm.checks import CONNECTOR
from lcguard.vllm.errors import HandoffError, StartError
from lcguard.vllm.gatekeeper import Gatekeeper
from lcguard.vllm.options import check_params
from lcguard.vllm.request import PARAM, Handoff, tokens_digest


class FrontEnd:
    """Checks handoffs against the same store, policy and key as the engine."""

    def __init__(self, gatekeeper: Gatekeeper) -> None:
        self.gatekeeper = gatekeeper

    @classmethod
    def of(cls, config: Any) -> FrontEnd:
        """For a ``VllmConfig``. Raises ``HandoffError`` (400) for an engine without connector."""
        from vllm import envs

        from lcguard.vllm.setup import gatekeeper_of

        transfer = config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            raise HandoffError(400, f"this engine runs without {CONNECTOR}: leave out {PARAM}")
        try:
            return cls(gatekeeper_of(config, not envs.VLLM_ENABLE_V1_MULTIPROCESSING))
        except StartError as error:
            raise HandoffError(400, f"the handoff is not configured: {error}") from None

    def admit(self, handoff: Handoff, prompt: Any, params: Any) -> Any:
        """The engine's prompt, with placeholders in front and redacted spans overwritten.

        ``params``: this request's own; its answer is kept within the room there is.

        Raises ``HandoffError`` for whatever the engine would refuse.
        """
        self.gatekeeper.check_origin(handoff)
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
            raise HandoffError(400, f"a handoff takes a prompt of tokens or text, not {kind!r}")
        check_params(params)
        if handoff.publish is not None and handoff.publish.handle is None and params.stop:
            # found here, before the engine has said under which handle it stored
            raise HandoffError(
                400, "stop: its strings end the answer before the handle is there; leave it out, "
                "or use stop_token_ids",
            )  # fmt: skip
        ids = list(prompt["prompt_token_ids"])
        facts, n, placed, segments = self.gatekeeper.facts, 0, 0, None
        if handoff.consume is not None:
            segments = self.gatekeeper.segments(handoff.consume)
            n = sum(m.n_tokens for m in segments)
            if handoff.consume.placed:
                placed = n
            elif not ids:
                raise HandoffError(400, "the prompt is empty: add at least one token of your own")
        if handoff.publish is not None and handoff.publish.tokens is not None:
            if handoff.publish.tokens != tokens_digest(ids[placed:]):
                raise HandoffError(
                    400, "the engine reads this prompt as other tokens than its spans were counted "
                    "on: leave out what changes the prompt (tool_choice, response_format)",
                )  # fmt: skip
        if handoff.publish is not None and self.gatekeeper.edge(handoff.publish).guard == "redact":
            for start, end in handoff.publish.spans or ():
                if 0 <= start < end <= len(ids) - placed:
                    ids[placed + start : placed + end] = [facts.neutral_id] * (end - start)
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
            400, f"min_tokens={params.min_tokens}: there is room for {room_tokens} behind what is "
            "consumed",
        )  # fmt: skip
    params.max_tokens = min(room_tokens, params.max_tokens or room_tokens)


def failure_of(output: Any) -> HandoffError | None:
    """Why a finished handoff failed inside the engine; None where it did not."""
    answer = (output.kv_transfer_params or {}).get(PARAM) or {}
    if "error" in answer:
        return HandoffError(int(answer.get("status", 400)), str(answer["error"]))
    if any(o.finish_reason == "error" for o in output.outputs):
        return HandoffError(
            404, "a segment could not be loaded: it expired, was revoked or is damaged; the "
            "engine's log says which",
        )  # fmt: skip
    return None
