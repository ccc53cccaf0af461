"""Traces: the spans of real requests, and that nothing of what was said is in them."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from lcguard.agents.nano.load import model_path
from lcguard.commands.live_servers import UPSTREAM_KEY, Running, Site
from lcguard.commands.serve import load_settings
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.server.app import make_app
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.lifespan import Deployment, lifespan
from lcguard.server.tracing.environment import open_tracing
from lcguard.server.tracing.spans import HANDLE_CHARS, Traced, Untraced
from tests.engine import needs_vllm
from tests.server.proxy import ASK_COMPLAINT, ASK_SSN, NOTE

pytest_plugins = ("tests.server.proxy_fixtures",)
pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PLAIN, ODD_MODEL = "Tell me of walruses and quinces.", "the-plumbers-daughter"
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


class Seen(NamedTuple):
    """What the clients sent and got, and what was noted of it."""

    spans: list[Any]
    passed: list[Mapping[str, str]]
    """Headers that vLLM was sent."""
    secret: set[str]
    """What no span may hold."""
    handle: str


@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
class TestSpansOfRealRequests:
    @pytest.fixture(scope="class")
    def seen(
        self, site: Site, engine: Running, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Seen]:
        folder = tmp_path_factory.mktemp("traced")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(UPSTREAM_KEY, engine.api_key)
            yield asyncio.run(asyncio.wait_for(_requests(site, engine, folder), 600))
        gc.unfreeze()

    def test_a_handoff_is_one_trace_below_the_clients(self, seen: Seen) -> None:
        spans = {s.name: s for s in seen.spans if s.context.trace_id == int(TRACE, 16)}
        assert set(spans) == {
            "POST /v1/chat/completions",
            "lcguard.authorize",
            "chat nano",
            "lcguard.settle",
        }
        whole = spans["POST /v1/chat/completions"]
        assert whole.parent.span_id == int(PARENT, 16)
        assert whole.kind.name == "SERVER"
        assert dict(whole.attributes) == {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "lcguard.tenant": "default",
            "lcguard.agent": "open",
            "lcguard.verdict": "allowed",
            "lcguard.consumed": 1,
        }
        assert spans["lcguard.authorize"].parent.span_id == whole.context.span_id
        asked = spans["chat nano"]
        assert asked.parent.span_id == whole.context.span_id
        assert asked.kind.name == "CLIENT"
        assert dict(asked.attributes) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": "nano",
            "gen_ai.request.max_tokens": 16,
            "gen_ai.request.temperature": 0,
        }
        assert spans["lcguard.settle"].parent.span_id == asked.context.span_id

    def test_vllm_is_told_whose_its_own_spans_are(self, seen: Seen) -> None:
        (asked,) = [
            s for s in seen.spans if s.name == "chat nano" and s.context.trace_id == int(TRACE, 16)
        ]
        wanted = f"00-{TRACE}-{asked.context.span_id:016x}-01"
        assert [h["traceparent"] for h in seen.passed if TRACE in h["traceparent"]] == [wanted]
        assert len({h["traceparent"] for h in seen.passed}) == len(seen.passed)

    def test_a_publish_names_its_edge(self, seen: Seen) -> None:
        found = [dict(s.attributes) for s in seen.spans if "lcguard.audience" in s.attributes]
        assert len(found) == 3  # the request, what authorized it, what settled it
        for attributes in found:
            assert attributes["lcguard.source"] == "intake"
            assert attributes["lcguard.audience"] == "open"
            assert attributes["lcguard.guard"] == "identity"
            assert attributes["lcguard.handle"] == seen.handle[:HANDLE_CHARS]

    def test_a_refusal_has_its_code_and_no_words(self, seen: Seen) -> None:
        refused = [s for s in seen.spans if s.attributes.get("lcguard.verdict") == "blocked"]
        assert [(s.attributes["http.response.status_code"]) for s in refused] == [403, 401]
        assert refused[0].attributes["lcguard.code"] == "not_audience"
        assert "lcguard.agent" not in refused[1].attributes
        (tried,) = [s for s in seen.spans if s.name == "lcguard.authorize" and not s.status.is_ok]
        assert tried.attributes["error.type"] == "not_audience"
        assert tried.status.description is None

    def test_nothing_that_was_said_is_in_a_span(self, seen: Seen) -> None:
        assert len(seen.spans) > 10
        text = json.dumps([json.loads(span.to_json()) for span in seen.spans])
        values = " ".join(
            str(v) for s in seen.spans for v in (s.name, *dict(s.attributes or {}).values())
        )
        assert [secret for secret in seen.secret if secret in text] == []
        words = {w for t in (NOTE, PLAIN, ASK_SSN) for w in re.findall(r"[\w-]{4,}", t)}
        assert [word for word in words | {ODD_MODEL} if word in values] == []
        assert all(not span.events for span in seen.spans)


async def _requests(site: Site, engine: Running, folder: Path) -> Seen:
    """Publishes, consumes, is refused, streams and asks for a model that is none."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    own, spans, passed = Site(folder), InMemorySpanExporter(), []
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    keys = {name: own.key(name) for name in ("intake", "open", "clerk")}
    sets = ["canaries.enabled=false", f"policy={site.policy}", f"store={site.store}"]
    settings = load_settings(folder, None, sets, engine.url)
    key = bytes.fromhex(site.environment[KEY_VARIABLE])
    deployment = Deployment(
        settings, key, str(model_path()), "nano", None, folder, lambda text: None
    )
    app = make_app(lambda: lifespan(deployment))
    async with app.router.lifespan_context(app):
        proxy = app.state.proxy
        proxy.tracing = Traced(provider)
        while not proxy.readiness.ready:
            await asyncio.sleep(0.05)
        post = proxy.upstream.post

        async def posted(path: str, body: bytes, headers: Mapping[str, str]) -> Any:
            if "traceparent" in headers:  # not one of the proxy's own checks
                passed.append(headers)
            return await post(path, body, headers)

        proxy.upstream.post = posted
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://proxy", timeout=300
        ) as http:

            async def chat(who: str, text: str, headers: Any = None, **more: Any) -> httpx.Response:
                body = {"model": "nano", "max_tokens": 16, "temperature": 0}
                body |= {"messages": [{"role": "user", "content": text}], **more}
                bearer = {"Authorization": f"Bearer {keys.get(who, who)}", **(headers or {})}
                return await http.post("/v1/chat/completions", json=body, headers=bearer)

            answer = await chat("intake", NOTE, lcguard={"publish": {"audience": "open"}})
            handle = answer.json()["lcguard"]["published"]["handle"]
            consume = {"consume": [handle]}
            sent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            got = await chat("open", ASK_COMPLAINT, sent, lcguard=consume)
            assert got.status_code == 200, got.text
            assert (await chat("clerk", ASK_SSN, lcguard=consume)).status_code == 403
            assert (await chat("lcg_nobody", ASK_SSN)).status_code == 401
            stream = await chat("intake", PLAIN, stream=True)
            assert "[DONE]" in stream.text
            odd = await chat("intake", PLAIN, model=ODD_MODEL)
            assert odd.status_code == 404
            said = got.json()["choices"][0]["message"]["content"]
    secret = {handle, key.hex(), engine.api_key, *keys.values(), NOTE, PLAIN, said}
    return Seen(list(spans.get_finished_spans()), passed, secret, handle)


# -- what the environment asks for


def test_without_a_collector_nothing_is_traced() -> None:
    for environment in (
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ):
        assert isinstance(open_tracing(environment), Untraced)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc' is no protocol"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "write otlp"),
    ],
)
def test_what_cannot_be_sent_is_refused(more: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_tracing({ENDPOINT: "http://127.0.0.1:1", **more})


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"pip install 'lcguard\[otel\]'"):
        open_tracing({ENDPOINT: "http://127.0.0.1:1"})


def test_spans_reach_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one as far as HTTP goes: it takes what the SDK posts, and reads it."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_RESOURCE_ATTRIBUTES": "site=a"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        tracing = open_tracing(environment)
        x = Exchange({}, None, "request-1", tracing)  # type: ignore[arg-type]
        with tracing.request(x, "/v1/completions"):
            x.status = 200
        tracing.close()
        server.shutdown()
        thread.join()
    (path, sent) = got[0]
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    told = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert told["service.name"] == "lcguard"
    assert told["site"] == "a"
    assert [s.name for s in resource.scope_spans[0].spans] == ["POST /v1/completions"]
