"""The spans of a request: the request itself, what authorizes it, vLLM's part, and what settles it.

An attribute holds only what the proxy itself says: names of keys' agents, the policy's guards,
codes, counts. Never what a client sent, so that no text gets to where traces are kept, and of a
handle its first characters alone. Names of attributes are OpenTelemetry's for HTTP and for
generative AI where it has some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from lcguard.handoff.names import split_tenant

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lcguard.server.authorization.approved_handoff import ApprovedHandoff
    from lcguard.server.gateway.exchange import Exchange

HANDLE_CHARS = 6
"""Of a handle, as in messages: it tells apart, and opens nothing."""
_OPERATION = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_NUMBERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "n": "gen_ai.request.choice.count",
}


class Tracing(Protocol):
    """What the proxy notes of its work."""

    def request(self, x: Exchange, route: str) -> AbstractContextManager[None]:
        """A whole request; what became of it is read off ``x`` at its end."""

    def step(self, name: str, x: Exchange) -> AbstractContextManager[None]:
        """A part of the request in which it is decided, or settled."""

    def upstream(
        self, route: str, model: str, body: Mapping[str, Any]
    ) -> AbstractContextManager[Mapping[str, str]]:
        """vLLM's part. Gives the headers by which vLLM's own spans belong to it, in the place of
        the client's; ``body``: of which numbers are noted."""

    def close(self) -> None:
        """Sends what is left."""


class Untraced:
    """Notes nothing."""

    def request(self, x: Exchange, route: str) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, name: str, x: Exchange) -> AbstractContextManager[None]:
        return nullcontext()

    def upstream(
        self, route: str, model: str, body: Mapping[str, Any]
    ) -> AbstractContextManager[Mapping[str, str]]:
        return nullcontext({})

    def close(self) -> None:
        return None


class Traced:
    """Notes spans. Needs the extra ``otel``."""

    def __init__(self, provider: Any) -> None:
        """``provider``: an SDK's ``TracerProvider``, not the process's global one."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._api = provider, trace
        self._tracer = provider.get_tracer("lcguard.server")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, x: Exchange, route: str) -> Iterator[None]:
        parent = self._propagator.extract(x.headers)
        first = {"http.request.method": "POST", "http.route": route}
        kind = self._api.SpanKind.SERVER
        with self._span(f"POST {route}", kind, first, parent) as span:
            try:
                yield
            finally:
                self._end(span, _of_request(x), x.code if _verdict(x) == "error" else "")

    @contextmanager
    def step(self, name: str, x: Exchange) -> Iterator[None]:
        with self._span(f"lcguard.{name}", self._api.SpanKind.INTERNAL, {}) as span:
            failed = ""
            try:
                yield
            except BaseException as error:
                failed = getattr(error, "code", type(error).__name__)
                raise
            finally:
                self._end(span, _of_handoff(x.approved) if x.approved else {}, failed)

    @contextmanager
    def upstream(
        self, route: str, model: str, body: Mapping[str, Any]
    ) -> Iterator[Mapping[str, str]]:
        operation = _OPERATION[route]
        first: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model,
        }
        for field, name in _NUMBERS.items():
            if isinstance(value := body.get(field), int | float):
                first[name] = value
        with self._span(f"{operation} {model}", self._api.SpanKind.CLIENT, first) as span:
            headers: dict[str, str] = {}
            self._propagator.inject(headers)
            failed = ""
            try:
                yield headers
            except BaseException as error:
                failed = getattr(error, "code", type(error).__name__)
                raise
            finally:
                self._end(span, {}, failed)

    def close(self) -> None:
        self._provider.shutdown()

    def _span(self, name: str, kind: Any, first: Mapping[str, Any], parent: Any = None) -> Any:
        # what an exception says may quote a request: its code alone is noted
        return self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=dict(first),
            record_exception=False,
            set_status_on_exception=False,
        )

    def _end(self, span: Any, noted: Mapping[str, Any], failed: str) -> None:
        span.set_attributes(dict(noted))
        if failed:
            span.set_attribute("error.type", failed)
            span.set_status(self._api.StatusCode.ERROR)


def _of_request(x: Exchange) -> dict[str, Any]:
    out: dict[str, Any] = {"http.response.status_code": x.status or 499}
    if x.who is not None:
        out |= {"lcguard.tenant": x.who.tenant, "lcguard.agent": x.who.agent}
    if x.code:
        out |= {"lcguard.code": x.code}
    out["lcguard.verdict"] = _verdict(x)
    return out | (_of_handoff(x.approved) if x.approved else {})


def _verdict(x: Exchange) -> str:
    """A stream that broke off and a client that left are errors, whatever their status."""
    if not x.code:
        return "allowed"
    return "blocked" if 400 <= x.status < 500 else "error"


def _of_handoff(approved: ApprovedHandoff) -> dict[str, Any]:
    """Who hands over to whom, under what, and how many; no more of a segment than that."""
    out: dict[str, Any] = {"lcguard.consumed": len(approved.consumed)}
    if (edge := approved.edge) is not None:
        made = approved.publishes
        out |= {
            "lcguard.source": split_tenant(edge.source)[1],
            "lcguard.audience": ",".join(split_tenant(p.hop.own.audience)[1] for p in made),
            "lcguard.guard": edge.guard,
            "lcguard.policy": ",".join(p.hop.alone.digest[:12] for p in made),
            "lcguard.handle": ",".join(p.handle[:HANDLE_CHARS] for p in made),
        }
    return out
