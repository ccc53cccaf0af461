"""Ways around the proxy: routes of vLLM's that take no key, and handoffs that it did not sign."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lcguard.commands.live_servers import Running, Site
from lcguard.vllm.authentication import AuthenticationMiddleware
from tests.engine import needs_vllm
from tests.server.proxy import POLICY, Front, front_of
from tests.server.proxy_client import until

pytest_plugins = ("tests.server.proxy_fixtures",)

PATHS = ("/health", "/invocations", "/ping", "/metrics", "/v1/completions", "/healthy", "//health")


def client(monkeypatch: pytest.MonkeyPatch, key: str | None) -> TestClient:
    if key is None:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
    else:
        monkeypatch.setenv("VLLM_API_KEY", key)

    def yes(request: Any) -> PlainTextResponse:
        return PlainTextResponse("yes")

    methods = ["GET", "POST", "OPTIONS"]
    app = Starlette(routes=[Route("/{any:path}", yes, methods=methods)])
    return TestClient(AuthenticationMiddleware(app), raise_server_exceptions=True)


@pytest.mark.parametrize("key", [None, "", "secret"])
def test_all_but_health_asks_for_the_key(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    """Also where no key is set: an engine that was started without one is no open engine."""
    http = client(monkeypatch, key)
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS"):
            for given in (None, "", "Bearer ", "Bearer secrets", "Basic secret", "secret"):
                headers = {} if given is None else {"Authorization": given}
                answer = http.request(method, path, headers=headers)
                is_open = path == "/health" and method == "GET"
                assert answer.status_code == (200 if is_open else 401), (method, path, given)
    headers = {"Authorization": "Bearer secret"}
    answer = http.post("/invocations", headers=headers)
    assert answer.status_code == (200 if key == "secret" else 401)


@needs_vllm
@pytest.mark.vllm
def test_every_route_of_the_real_engine_is_shut(engine: Running) -> None:
    with httpx.Client(base_url=engine.url, timeout=120) as http:
        key = {"Authorization": f"Bearer {engine.api_key}"}
        paths = http.get("/openapi.json", headers=key).json()["paths"]
        assert {"/invocations", "/v1/completions", "/tokenize", "/version"} <= set(paths)
        told = [(m.upper(), p) for p, methods in paths.items() for m in methods]
        for method, path in [*told, ("GET", "/metrics"), ("GET", "/docs"), ("OPTIONS", "/v1")]:
            wanted = 200 if (method, path) == ("GET", "/health") else 401
            assert http.request(method, path).status_code == wanted, (method, path)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
def test_the_engine_takes_no_handoff_that_the_proxy_did_not_sign(
    engine: Running, front: Front, site: Site, path: str
) -> None:
    """Even with the engine's key: it says who may ask vLLM, not what the policy lets pass."""
    before = sorted((site.folder / "segments").glob("*"))
    body = {
        "model": "nano",
        "prompt": "The SSN is 912-55-1029.",
        "max_tokens": 1,
        "kv_transfer_params": {
            "lcguard": {
                "publish": {
                    "source": "default/intake",
                    "audience": "default/open",
                }
            }
        },
    }
    key = {"Authorization": f"Bearer {engine.api_key}"}
    answer = httpx.post(engine.url + path, json=body, headers=key, timeout=60)
    assert answer.status_code == 403, answer.text
    assert "from its proxy alone" in answer.text
    assert sorted((site.folder / "segments").glob("*")) == before
    assert front.handle(front.auth("intake"), "open")


@needs_vllm
@pytest.mark.vllm
def test_before_an_engine_with_an_open_door_nothing_is_published(tmp_path: Path) -> None:
    """As the vLLM of before was: a key under /v1, none at /invocations."""
    site = Site(tmp_path / "site", {"version": 1, "edges": POLICY["edges"][-1:]})
    site.door = False
    with (
        site.engine(args=("--block-size", "32")) as engine,
        front_of(site, engine, tmp_path / "front", ready=False) as front,
    ):

        def reason() -> str:
            with suppress(httpx.TransportError):  # it does not listen yet
                return str(front.ready()["checks"].get("door", {}).get("detail", ""))
            return ""

        until(
            lambda: "--middleware lcguard.vllm.authentication.AuthenticationMiddleware" in reason(),
            60.0,
            "it finds the door",
        )
        refused = front.publish(front.auth("intake"), "billing")
        assert refused.status_code == 503
        assert "without its key" in json.dumps(refused.json())
