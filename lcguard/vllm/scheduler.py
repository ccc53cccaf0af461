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

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.gatekeeper import Gatekeeper, Plan
from lcguard.handoff.request import PARAM, Handoff, parse_handoff
from lcguard.manifest import Manifest
from lcguard.rope import canonical
from lcguard.store import StoreError
from lcguard.store.line import Call, StoreLine
from lcguard.vllm.deferred_outputs import DeferredOutputs
from lcguard.vllm.jobs import LoadJob, SaveJob, StepJobs, Wanted
from lcguard.vllm.options import check_request, reads_prompt

logger = init_logger("vllm.lcguard.scheduler")
IDLE_S = 0.0005


@dataclass
class Booked:
    """A request with a handoff, from its arrival to its end."""

    request: Any
    given_salt: str = ""
    """As it came, from the proxy."""
    handoff: Handoff | None = None
    asked: Call[tuple[Manifest, ...]] | None = None
    """The store's answer about what it consumes, while that is awaited."""
    plan: Plan = field(default_factory=Plan)
    n_external: int = 0
    """Tokens that the worker brings."""
    failure: HandoffError | None = None
    saved: bool = False


class HandoffScheduler:
    """Scheduler side of one engine."""

    def __init__(self, gatekeeper: Gatekeeper, line: StoreLine) -> None:
        self.gatekeeper, self._line = gatekeeper, line
        self.deferred = DeferredOutputs(gatekeeper)
        # Per engine and start: nobody else can name a salted block, not even with the same key.
        self._secret = secrets.token_bytes(32)
        self._booked: dict[str, Booked] = {}
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
        booked = self._booked[request.request_id] = Booked(request, given)
        try:
            booked.handoff = handoff = parse_handoff(request.kv_transfer_params)
            assert handoff is not None
            check_request(request)
            if (consume := handoff.consume) is not None:
                # whatever salt the client chose hits nothing until the plan names the blocks
                self._isolate(request, secrets.token_hex(16))
                booked.asked = self._line.submit(lambda: self.gatekeeper.segments(consume))
                return
            self._plan(booked, ())
        except Exception as error:
            self._refuse(booked, error)

    def _planned(self, booked: Booked) -> bool:
        """Whether the plan is made. In the call that makes it this is still False: the scheduler
        has looked for cached blocks under another name, and looks again."""
        if booked.asked is None:
            return True
        if booked.asked.ended():
            asked, booked.asked = booked.asked, None
            try:
                self._plan(booked, asked.result())
            except Exception as error:
                self._refuse(booked, error)
        return False

    def _plan(self, booked: Booked, segments: tuple[Manifest, ...]) -> None:
        request = booked.request
        assert booked.handoff is not None
        booked.plan = self.gatekeeper.plan(
            booked.handoff, request.prompt_token_ids, segments=segments
        )
        booked.n_external = booked.plan.n_consumed
        self._isolate(request, self._salt(booked.plan, booked.given_salt))

    def _refuse(self, booked: Booked, error: Exception) -> None:
        request = booked.request
        if isinstance(error, StoreError):
            error = HandoffError(503, str(error))
        elif not isinstance(error, HandoffError):
            logger.exception("lcguard: planning request %s failed", request.request_id)
            error = HandoffError(400, f"the handoff could not be planned: {type(error)}")
        logger.warning("lcguard: request %s refused: %s", request.request_id, error)
        # all but the last token are claimed, never brought: the request ends in an error
        booked.plan, booked.n_external = Plan(), request.num_prompt_tokens - 1
        booked.failure = error
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
        text = canonical([consumed, plan.agent, source, given])
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def external_tokens(self, request: Any, n_computed: int) -> tuple[int | None, bool]:
        """Tokens that the worker brings beyond ``n_computed``, and whether beside the forward;
        None while nobody knows yet."""
        booked = self._booked.get(request.request_id)
        if booked is None:
            return 0, False
        if not self._planned(booked):
            return None, False
        n = max(0, booked.n_external - n_computed)
        return n, n > 0

    def allocated(self, request: Any, blocks: Any, n_external: int) -> None:
        """Blocks for the external tokens are there."""
        booked = self._booked.get(request.request_id)
        if booked is None or n_external <= 0:
            return
        self._ready[request.request_id] = LoadJob(
            request.request_id,
            list(blocks.get_block_ids()[0]),
            tuple(Wanted(m.handle, m.hmac, m.n_tokens) for m in booked.plan.consume),
            skip=booked.n_external - n_external,
            n_tokens=booked.n_external,
            failure=str(booked.failure or ""),
        )

    def step(self, output: Any) -> StepJobs:
        """The jobs of this step. A prompt is published in the step that computes its end."""
        if not output.num_scheduled_tokens:
            time.sleep(IDLE_S)  # all requests wait for the store, whose threads need the time
        idle = not output.num_scheduled_tokens
        jobs = StepJobs(loads=list(self._ready.values()), idle=idle)
        self._ready.clear()
        for request_id, n_scheduled in output.num_scheduled_tokens.items():
            booked = self._booked.get(request_id)
            if booked is None or booked.plan.publish is None or booked.saved:
                continue
            request = booked.request
            first = request.num_computed_tokens  # before this step
            if first < request.num_prompt_tokens <= first + n_scheduled:
                blocks = output.kv_connector_block_state.get_block_ids(request_id)[0]
                jobs.saves.append(
                    SaveJob(request_id, list(blocks), request.num_prompt_tokens,
                            booked.plan.publish)
                )  # fmt: skip
                booked.saved = True  # once, whatever preemption does
                self.deferred.begin(booked.plan.publish)
        return jobs

    def finished(self, request: Any) -> dict[str, Any] | None:
        """What the answer says of the handoff; None for an ordinary request."""
        self._ready.pop(request.request_id, None)
        booked = self._booked.pop(request.request_id, None)
        if booked is None:
            return None
        if booked.asked is not None:
            booked.asked.drop()
        if booked.failure is not None:
            return {PARAM: {"error": str(booked.failure), "status": booked.failure.status}}
        answer: dict[str, Any] = {}
        if booked.plan.consume:
            answer["consumed_tokens"] = booked.plan.shown_tokens
        if booked.saved and booked.plan.publish is not None:
            self.deferred.expect(request, booked.plan.publish, answer)
        return {PARAM: answer}

    def close(self) -> None:
        self._line.close(wait=False)
