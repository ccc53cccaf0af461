"""The end of a publish: its last output is held back until the worker has stored the segment.

vLLM sends a request's last output in the step that finishes it; the store may answer seconds later.
So the output waits here, and nothing else does: the engine goes on with everybody's requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import RequestStatus

from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.plan import PublishPlan
from lcguard.handoff.request import PARAM, SCANNED
from lcguard.manifest import Manifest
from lcguard.vllm.errors import NOT_STORED
from lcguard.vllm.jobs import SaveResults
from lcguard.vllm.scanned_prefixes import ScannedPrefixes

logger = init_logger("vllm.lcguard.deferred_outputs")
_UNANSWERED = (
    RequestStatus.FINISHED_ABORTED,
    RequestStatus.FINISHED_ERROR,
    RequestStatus.FINISHED_IGNORED,
)


@dataclass
class _Expected:
    """A publish whose tokens are all there."""

    plan: PublishPlan
    consumed: Sequence[Manifest]
    """What stands before the segment."""
    own: Sequence[int]
    """The segment's tokens."""
    answer: dict[str, Any]
    """What it says of the rest of the handoff."""
    held: tuple[int, Any] | None = None
    """Its client, and its last output."""


class DeferredOutputs:
    """Publishes of one engine between the order to save them and the store's word."""

    def __init__(self, gatekeeper: Gatekeeper, prefixes: ScannedPrefixes) -> None:
        self._gatekeeper, self._prefixes = gatekeeper, prefixes
        self._reasons: dict[str, str | None] = {}
        """Handle to why nothing was stored; empty where it was, None while nobody knows."""
        self._found: dict[str, list[tuple[int, int]]] = {}
        """Of handles whose guard only looked for secrets."""
        self._kept: dict[str, int] = {}
        """Tokens that the worker keeps of the same."""
        self._expected: dict[str, _Expected] = {}

    @property
    def pending(self) -> bool:
        """Whether the engine has to go on stepping though it computes nothing."""
        return bool(self._expected)

    def begin(self, plan: PublishPlan) -> None:
        """The worker is told to save it."""
        self._reasons[plan.handle] = None

    def expect(
        self,
        request: Any,
        plan: PublishPlan,
        consumed: Sequence[Manifest],
        answer: dict[str, Any],
    ) -> None:
        """A publish that was begun has finished; ``answer``: the rest of what it says."""
        if request.status in _UNANSWERED:  # a stop string may have ended it: see the front end
            self._reasons.pop(plan.handle, None)
            self._found.pop(plan.handle, None)
            if self._kept.pop(plan.handle, 0):
                self._prefixes.release(plan.handle)
            return
        own = request.prompt_token_ids[plan.start_token :]
        self._expected[request.request_id] = _Expected(plan, consumed, own, answer)

    def take(self, saved: SaveResults) -> None:
        """The worker's word."""
        self._reasons |= {h: why for h, why in saved.reasons.items() if h in self._reasons}
        self._found |= {h: spans for h, spans in saved.found.items() if h in self._reasons}
        for handle, n_tokens in saved.kept.items():
            if handle in self._reasons:
                self._kept[handle] = n_tokens
            else:  # its client left
                self._prefixes.release(handle)

    def pass_on(self, outputs: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
        """A step's outputs without those held back, and with those whose segment is settled."""
        for client, found in outputs.items():
            kept = []
            for output in found.outputs:
                expected = self._expected.get(output.request_id)
                if expected is None or output.finish_reason is None:
                    kept.append(output)
                else:
                    expected.held = client, output
            found.outputs = kept
        for request_id, expected in list(self._expected.items()):
            reason = self._reasons[expected.plan.handle]
            if reason is None or expected.held is None:
                continue
            del self._expected[request_id], self._reasons[expected.plan.handle]
            client, output = expected.held
            output.kv_transfer_params = {PARAM: expected.answer | self._answer(expected, reason)}
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _answer(self, expected: _Expected, reason: str) -> dict[str, Any]:
        plan, gatekeeper = expected.plan, self._gatekeeper
        found, kept = self._found.pop(plan.handle, None), self._kept.pop(plan.handle, 0)
        if reason:
            logger.error("lcguard: %s published nothing: %s", plan.source, reason)
            return {"error": NOT_STORED, "status": 400}
        if plan.scan:
            scanned = gatekeeper.scanned(plan, expected.own, found or [])
            if kept:
                self._prefixes.offer(scanned["scan"], expected.consumed, plan.handle, kept)
            return {SCANNED: scanned}
        return gatekeeper.answer_planned(plan, len(expected.own))
