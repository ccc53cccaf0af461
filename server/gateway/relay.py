"""The routes that generate: a request on its way to vLLM and its answer on the way back.

One path for streams and whole answers: checked, limited, ordered, forwarded, and finished by the
code that saw what was stored. Plain ASGI, because every layer above costs each request.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

import aiohttp
from starlette.types import Receive, Scope, Send

from lcguard.server.audit.trail import Event
from lcguard.server.authorization.approved_handoff import ApprovedHandoff
from lcguard.server.crashes import unforeseen
from lcguard.server.errors import ProxyError
from lcguard.server.gateway.body import ClientGone, parse_object, read_body
from lcguard.server.gateway.contract import check
from lcguard.server.gateway.contract_error import ContractError
from lcguard.server.gateway.contract_fields import Endpoint
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import FIELD, HandoffField, read_handoff
from lcguard.server.gateway.outcome import applied, cleaned, outcome_headers, with_outcome
from lcguard.server.gateway.response_events import ResponseEvents
from lcguard.server.gateway.streaming import Stream
from lcguard.server.gateway.text_pass import TextPass
from lcguard.server.gateway.upstream import broken, reason_of
from lcguard.server.limits.generation import bounded_size
from lcguard.server.state import Proxy, TokenUsage

_TOTAL = re.compile(rb'"total_tokens":\s*(\d+)')
_TOTAL_NAME = b'"total_tokens":'
_PASSED_ON = {
    "traceparent": re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[\x20-\x7e]{1,512}"),
}
"""Headers for vLLM's traces, as their standard has them."""
_NOT_STORED = b"the segment was not stored"
"""In vLLM's refusal where its guard or its store failed."""


class Relay:
    """ASGI application of one generating route."""

    def __init__(self, proxy: Proxy, endpoint: Endpoint, path: str) -> None:
        self.proxy, self.endpoint, self.path = proxy, endpoint, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        tracing = self.proxy.tracing
        exchange = Exchange(headers, send, self.proxy.request_id(headers), self.endpoint, tracing)
        with self.proxy.watch(exchange, self.endpoint), tracing.request(exchange, self.path):
            try:
                await self._answer(exchange, receive)
            except ProxyError as error:
                await exchange.refuse(error)
            except ClientGone:
                exchange.code = "client_gone"
            except Exception as error:
                await exchange.refuse(unforeseen(self.endpoint, error))

    async def _answer(self, x: Exchange, receive: Receive) -> None:
        proxy, limits = self.proxy, self.proxy.settings.limits
        x.who = proxy.authenticate(x.headers)
        raw = await read_body(receive, x.headers, limits.max_body_bytes, limits.body_timeout_s)
        # from here the only thing that a client can still do is to hang up
        work = asyncio.ensure_future(self._work(x, raw))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError, ProxyError):
                    await work  # vLLM is told, and the audit
        work.result()

    async def _work(self, x: Exchange, raw: bytes) -> None:
        proxy, who = self.proxy, x.who
        assert who is not None
        body = parse_object(raw, x.headers)
        handoff = read_handoff(body.pop(FIELD, None), x.headers)
        try:
            body = check(
                self.endpoint,
                body,
                # what tells of tokens would go past the guard of an answer as well
                consuming=bool(handoff and (handoff.consume or _guards_answer(handoff))),
                publishing=bool(handoff and handoff.publish),
            )
        except ContractError as error:
            raise ProxyError(400, str(error), code="contract", param=error.param) from None
        limits, per_min = proxy.settings.limits, proxy.limits.of(who.limits).tokens_per_min
        proxy.check_model(who, body)
        size = bounded_size(
            self.endpoint, body, len(raw), limits.max_output_tokens, proxy.context(), per_min
        )
        handles = (handoff.consume or ()) if handoff else ()
        with proxy.active_reads.reading(handles) as reading:
            async with proxy.admit(who, size.total) as usage:
                body["cache_salt"] = proxy.salt(who)
                if x.responds:
                    body["store"] = False  # vLLM would keep it for whoever names it
                try:
                    if handoff is not None:
                        _one_prompt(self.endpoint, body)
                        with x.tracing.step("authorize", x):
                            body = await self._hand_over(x, handoff, body)
                    with x.tracing.upstream(self.path, proxy.model, body) as trace:
                        await self._within(self._forward(x, body, usage, trace))
                except BaseException as error:
                    if isinstance(error, asyncio.CancelledError):
                        usage.used_tokens = size.total  # an answer left before its end is not free
                    await self._undo(x, error, reading.ended)
                    raise

    async def _hand_over(
        self, x: Exchange, handoff: HandoffField, body: dict[str, Any]
    ) -> dict[str, Any]:
        """The body for vLLM of a handoff that may happen. Raises ``ProxyError``."""
        proxy, who = self.proxy, x.who
        assert who is not None
        if handoff.text is not None:
            x.text = TextPass(proxy.text_hops, handoff.text, who, x.request_id)
            body = await x.text.request(self.endpoint, body)
        if handoff.publish is not None or handoff.consume is not None:
            x.approved = await proxy.authority.open(who, handoff, self.endpoint, body, x.request_id)
            body["kv_transfer_params"] = {"lcguard": x.approved.params}
            if x.responds and x.approved.handle:
                body["request_id"] = f"resp_{x.approved.handle}"  # the answer's id
        if x.text is not None:
            await x.text.allow_answer(x.approved.consumed if x.approved else ())
        return body

    async def _within(self, forwarded: Coroutine[Any, Any, None]) -> None:
        """The deadline of an answer, a client included that is slow to take it."""
        limit_s = self.proxy.settings.upstream.total_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await forwarded
        except TimeoutError:
            raise ProxyError(
                504, f"the answer was not taken within {limit_s:g} s", code="upstream_timeout"
            ) from None

    async def _undo(self, x: Exchange, error: BaseException, revoked: bool) -> None:
        """Whatever ended it, the audit says that the handoff did not come about."""
        if x.approved is None and x.text is None:
            return
        left = isinstance(error, asyncio.CancelledError) and not revoked
        reason = "the client hung up" if left else type(error).__name__
        if isinstance(error, ProxyError):
            reason = f"{error.code}: {error.message}"
        if revoked:
            reason = "a segment that it read was revoked"
        # not to be cancelled itself
        await asyncio.shield(self._fail(x, "aborted" if left else "failed", reason))

    async def _fail(self, x: Exchange, event: Event, reason: str) -> None:
        if x.approved is not None:
            await self.proxy.settlement.fail(x.approved, event, reason)
        if x.text is not None:
            await x.text.fail(event, reason)

    async def _forward(
        self, x: Exchange, body: dict[str, Any], usage: TokenUsage, trace: Mapping[str, str]
    ) -> None:
        """Relays vLLM's answer, and writes down the tokens that it took. ``trace``: headers of the
        proxy's own span, in the place of the client's."""
        passed = {
            k: v for k, form in _PASSED_ON.items() if form.fullmatch(v := x.headers.get(k, ""))
        }
        passed.update(trace)
        if x.approved is not None and x.approved.handle:
            # becomes the answer's id, which every client shows
            passed["x-request-id"] = x.approved.handle
        elif x.headers.get("x-request-id") == x.request_id:
            passed["x-request-id"] = x.request_id
        stream: Stream | None = None
        if body.get("stream"):
            settlement = self.proxy.settlement
            responds = x.responds
            stream = ResponseEvents(x, settlement) if responds else Stream(x, settlement, body)
        asked_s = time.perf_counter()
        answer = await self.proxy.upstream.post(
            self.path, json.dumps(body, separators=(",", ":")).encode(), passed
        )
        x.upstream_s += time.perf_counter() - asked_s
        try:
            kind = answer.headers.get("content-type", "application/json")
            if answer.status == 200:
                usage.used_tokens = usage.reserved  # until it is counted, should it break off
            if stream is not None and kind.startswith("text/event-stream"):
                counted = await stream.relay(answer, kind)
            else:
                counted = await self._whole(x, answer, kind)
            if counted is not None:
                # as the client is told: what is left of its tokens would tell the length otherwise
                usage.used_tokens = counted + (x.approved.unsaid_tokens if x.approved else 0)
        finally:
            answer.close()  # where vLLM still computes, it stops

    async def _whole(self, x: Exchange, answer: aiohttp.ClientResponse, kind: str) -> int | None:
        asked_s = time.perf_counter()
        try:
            data = await answer.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise broken(error) from None
        x.upstream_s += time.perf_counter() - asked_s
        _check_failed(x.approved, answer.status, data)
        counted, more = _counted(data), dict[str, str]()
        if x.approved is not None or x.text is not None:
            if answer.status != 200:
                await self._fail(x, "failed", f"vLLM answered {answer.status}")
            else:
                whole = cleaned(x, json.loads(data))
                if x.text is not None and x.responds:
                    whole["output"] = await x.text.output(whole.get("output", ()))
                elif x.text is not None:
                    whole["choices"] = await x.text.answer(whole.get("choices", ()))
                outcome = await applied(x, self.proxy.settlement)
                data = json.dumps(with_outcome(whole, outcome), separators=(",", ":")).encode()
                more = outcome_headers(outcome)
        await x.whole(answer.status, kind, data, more)
        return counted


def _guards_answer(handoff: HandoffField) -> bool:
    return handoff.text is not None and handoff.text.audience is not None


def _counted(data: bytes) -> int | None:
    """vLLM's own count: the last one, behind which log-probabilities of a prompt may stand."""
    at = data.rfind(_TOTAL_NAME)
    found = _TOTAL.match(data, at) if at >= 0 else None
    return int(found[1]) if found else None


def _check_failed(approved: ApprovedHandoff | None, status: int, data: bytes) -> None:
    """Raises ``ProxyError`` (502) for a failure of vLLM's, whatever status vLLM gives it: the
    client may send the same again."""
    lost = approved is not None and approved.edge is not None and _NOT_STORED in data
    if status >= 500 or (status != 200 and lost):
        raise ProxyError(
            502,
            f"vLLM answered {status}",
            detail=reason_of(data),
            code="not_stored" if lost else "upstream",
            retry_after_s=2,
        )


def _one_prompt(endpoint: Endpoint, body: dict[str, Any]) -> None:
    prompt = body.get("prompt")
    many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    if endpoint == "completions" and (many or not prompt):
        raise ProxyError(
            400,
            "prompt: a handoff takes exactly one prompt, of text or of tokens",
            code="contract",
            param="prompt",
        )


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
