"""The connector's half in the scheduler: plans handoffs, isolates their prefix-cache blocks.

An exception in here would kill the engine for everybody, so every refusal becomes a plan that
fails its own request. Nothing here waits for the store: while it is asked, the request is passed
over, and a publish's last output is held back until its segment is stored (``DeferredOutputs``).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from lcguard.canonical import canonical_json
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.plan import Plan
from lcguard.handoff.request import PARAM, Handoff, parse_handoff
from lcguard.manifest import Manifest
from lcguard.store import StoreError
from lcguard.store.line import Call, StoreLine
from lcguard.vllm.deferred_outputs import DeferredOutputs
from lcguard.vllm.jobs import LoadJob, SaveJob, SegmentRef, StepJobs
from lcguard.vllm.options import check_request, reads_prompt
from lcguard.vllm.scanned_prefixes import Prefix, ScannedPrefixes

logger = init_logger("vllm.lcguard.scheduler")
IDLE_S = 0.0005


@dataclass
class RequestTracker:
    """A request with a handoff, from its arrival to its end."""

    request: Any
    given_salt: str = ""
    """As it came, from the proxy."""
    handoff: Handoff | None = None
    asked: Call[tuple[Manifest, ...]] | None = None
    """The store's answer about what it consumes, while that is awaited."""
    plan: Plan = field(default_factory=Plan)
    prefix: Prefix | None = None
    """What its scan computed already."""
    n_external: int = 0
    """Tokens that the worker brings."""
    failure: HandoffError | None = None
    saved: bool = False


class HandoffScheduler:
    """Scheduler side of one engine."""

    def __init__(self, gatekeeper: Gatekeeper, line: StoreLine) -> None:
        self.gatekeeper, self._line = gatekeeper, line
        self.prefixes = ScannedPrefixes()
        self.deferred = DeferredOutputs(gatekeeper, self.prefixes)
        # Per engine and start: nobody else can name a salted block, not even with the same key.
        self._secret = secrets.token_bytes(32)
        self._tracked: dict[str, RequestTracker] = {}
        self._ready: dict[str, LoadJob] = {}

    def arrive(self, request: Any) -> None:
        """A new request, before any look into the prefix cache. Never raises."""
        if not isinstance(request.kv_transfer_params, Mapping | None):
            request.kv_transfer_params = None  # vLLM would ask it for its keys
        if PARAM not in (request.kv_transfer_params or {}):
            # whatever the request says: what is read from the cache is not computed
            request.skip_reading_prefix_cache |= reads_prompt(request.sampling_params)
            return
        given = request.cache_salt or ""
        tracked = self._tracked[request.request_id] = RequestTracker(request, given)
        try:
            tracked.handoff = handoff = parse_handoff(request.kv_transfer_params)
            assert handoff is not None
            check_request(request)
            if (consume := handoff.consume) is not None:
                # whatever salt the client chose hits nothing until the plan names the blocks
                self._isolate(request, secrets.token_hex(16))
                tracked.asked = self._line.submit(lambda: self.gatekeeper.segments(consume))
                return
            self._plan(tracked, ())
        except Exception as error:
            self._refuse(tracked, error)

    def _planned(self, tracked: RequestTracker) -> bool:
        """Whether the plan is made. In the call that makes it this is still False: the scheduler
        has looked for cached blocks under another name, and looks again."""
        if tracked.asked is None:
            return True
        if tracked.asked.ended():
            asked, tracked.asked = tracked.asked, None
            try:
                self._plan(tracked, asked.result())
            except Exception as error:
                self._refuse(tracked, error)
        return False

    def _plan(self, tracked: RequestTracker, segments: tuple[Manifest, ...]) -> None:
        request = tracked.request
        assert tracked.handoff is not None
        tracked.plan = self.gatekeeper.plan(
            tracked.handoff, request.prompt_token_ids, segments=segments
        )
        tracked.n_external = tracked.plan.n_consumed
        publish = tracked.handoff.publish
        if publish is not None and publish.scan is not None:
            # the plan has checked the word
            tracked.prefix = self.prefixes.claim(publish.scan, tracked.plan.consume)
        if tracked.prefix is not None:
            brought = tracked.n_external + tracked.prefix.n_tokens
            # the last token is computed: its output is the answer
            tracked.n_external = min(brought, request.num_prompt_tokens - 1)
        self._isolate(request, self._salt(tracked.plan, tracked.given_salt))

    def _refuse(self, tracked: RequestTracker, error: Exception) -> None:
        request = tracked.request
        if isinstance(error, StoreError):
            error = HandoffError(503, str(error))
        elif not isinstance(error, HandoffError):
            logger.exception("lcguard: planning request %s failed", request.request_id)
            error = HandoffError(400, f"the handoff could not be planned: {type(error)}")
        logger.warning("lcguard: request %s refused: %s", request.request_id, error)
        # all but the last token are claimed, never brought: the request ends in an error
        tracked.plan, tracked.n_external = Plan(), request.num_prompt_tokens - 1
        tracked.failure = error
        self._isolate(request, secrets.token_hex(16))

    @staticmethod
    def _isolate(request: Any, salt: str) -> None:
        """Whatever salt came with it only sets it further apart: it names no block of another's."""
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
        # where it is set, the scheduler does not ask for the segments
        request.skip_reading_prefix_cache = False

    def _salt(self, plan: Plan, given: str) -> str:
        """Names the prefix-cache blocks of one combination of segments, policy and agent.

        ``given`` is the proxy's secret salt of the agent. Where nobody has said who really sends,
        a published prompt's blocks are for this request alone: a source is only a name. So are
        those of a prompt that is only looked at: they hold what will be hidden.
        """
        if plan.publish and (plan.publish.scan or not (plan.consume or given)):
            return secrets.token_hex(16)
        consumed = [[m.handle, m.hmac, m.policy_digest, m.audience] for m in plan.consume]
        source = plan.publish.source if plan.publish else ""
        text = canonical_json([consumed, plan.agent, source, given])
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def external_tokens(self, request: Any, n_computed: int) -> tuple[int | None, bool]:
        """Tokens that the worker brings beyond ``n_computed``, and whether beside the forward;
        None while nobody knows yet."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        if not self._planned(tracked):
            return None, False
        n = max(0, tracked.n_external - n_computed)
        return n, n > 0

    def allocated(self, request: Any, blocks: Any, n_external: int) -> None:
        """Blocks for the external tokens are there."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or n_external <= 0:
            return
        self._ready[request.request_id] = LoadJob(
            request.request_id,
            list(blocks.get_block_ids()[0]),
            tuple(SegmentRef(m.handle, m.hmac, m.n_tokens) for m in tracked.plan.consume),
            skip=tracked.n_external - n_external,
            n_tokens=tracked.n_external,
            prefix=tracked.prefix.handle if tracked.prefix else "",
            failure=str(tracked.failure or ""),
        )

    def step(self, output: Any) -> StepJobs:
        """The jobs of this step. A prompt is published in the step that computes its end."""
        if not output.num_scheduled_tokens:
            time.sleep(IDLE_S)  # all requests wait for the store, whose threads need the time
        idle = not output.num_scheduled_tokens
        drop = self.prefixes.to_drop()
        jobs = StepJobs(loads=list(self._ready.values()), drop=drop, idle=idle)
        self._ready.clear()
        for request_id, n_scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.plan.publish is None or tracked.saved:
                continue
            request = tracked.request
            first = request.num_computed_tokens  # before this step
            if first < request.num_prompt_tokens <= first + n_scheduled:
                blocks = output.kv_connector_block_state.get_block_ids(request_id)[0]
                n_prompt, plan = request.num_prompt_tokens, tracked.plan.publish
                jobs.saves.append(SaveJob(request_id, list(blocks), n_prompt, plan))
                tracked.saved = True  # once, whatever preemption does
                self.deferred.begin(plan)
        return jobs

    def finished(self, request: Any) -> dict[str, Any] | None:
        """What the answer says of the handoff; None for an ordinary request."""
        self._ready.pop(request.request_id, None)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return None
        if tracked.asked is not None:
            tracked.asked.drop()
        if tracked.prefix is not None:
            self.prefixes.release(tracked.prefix.handle)
        if tracked.failure is not None:
            return {PARAM: {"error": str(tracked.failure), "status": tracked.failure.status}}
        answer: dict[str, Any] = {}
        if tracked.plan.consume:
            answer["consumed_tokens"] = tracked.plan.shown_tokens
        if tracked.saved and tracked.plan.publish is not None:
            consumed = tracked.plan.consume
            self.deferred.expect(request, tracked.plan.publish, consumed, answer)
        return {PARAM: answer}

    def close(self) -> None:
        self._line.close(wait=False)
