"""The proxy before a real vLLM: who sees, revokes and operates, and what the audit keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.engine import needs_vllm
from tests.paths import ROOT
from tests.server.proxy import ASK_SSN, NAME, SSN, Front, error, wait_for

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
ADK = ROOT / "build" / "adk" / "bin" / "python"


def test_who_lists_inspects_and_revokes(front: Front) -> None:
    publisher, reader, stranger = (front.auth(a) for a in ("intake", "open", "clerk"))
    auditor = front.auth("eve", role="auditor")
    foreign = front.auth("eve", "acme", role="auditor")
    admin = front.auth("root", "acme", role="admin")
    handle = front.handle(publisher, "open")
    path = f"/lcguard/v1/segments/{handle}"
    for who, sees in ((publisher, True), (reader, True), (auditor, True), (stranger, False)):
        listed = front.http.get("/lcguard/v1/segments", headers=who).json()["data"]
        assert (handle in {s["handle"] for s in listed}) is sees
        assert (front.http.get(path, headers=who).status_code == 200) is sees
    shown = front.http.get(path, headers=reader).json()
    assert shown["manifest"]["source_agent"] == "intake"
    assert not {"hmac", "tensor_digests", "n_tokens"} & set(shown["manifest"])
    assert error(front.http.get(path, headers=foreign)) == (404, "no_segment")
    for who in (reader, auditor):
        assert error(front.http.delete(path, headers=who)) == (403, "role")
    assert error(front.http.delete(path, headers=stranger)) == (404, "no_segment")
    assert front.http.delete(path, headers=admin).json()["revoked"] == [handle]
    mine = front.handle(publisher, "open")
    path = f"/lcguard/v1/segments/{mine}"
    assert front.http.delete(path, headers=publisher).status_code == 200


def test_the_policy_route_shows_what_concerns_the_caller(front: Front) -> None:
    def edges(header: dict[str, str]) -> set[tuple[str, str]]:
        found = front.http.get("/lcguard/v1/policy", headers=header).json()
        return {(e["tenant"], e["audience"]) for e in found["edges"]}

    every = edges(front.auth("root", role="admin"))
    assert ("acme", "partner") in every
    ours = edges(front.auth("intake"))
    assert ours == {(tenant, audience) for tenant, audience in every if tenant == "*"}
    acme = edges(front.auth("eve", "acme", role="auditor"))
    assert acme == ours | {("acme", "partner")}


def test_an_operators_routes_take_an_admins_key(front: Front) -> None:
    edge = {"tenant": "default", "source": "intake", "audience": "open"}
    path = "/lcguard/v1/leakage/reopen"
    for role in ("agent", "auditor"):
        refused = front.http.post(path, json=edge, headers=front.auth("x", role=role))
        assert error(refused) == (403, "role")
    unknown = front.http.post(path, json=edge, headers=front.auth("root", role="admin"))
    assert error(unknown) == (404, "no_edge")


def test_a_request_id_is_kept_and_found_in_the_audit(front: Front) -> None:
    answer = front.http.post(
        "/v1/completions",
        json={
            "model": "nano",
            "prompt": "a",
            "max_tokens": 1,
            "lcguard": {"publish": {"audience": "open"}},
        },
        headers=front.auth("intake") | {"X-Request-Id": "order-77"},
    )
    assert answer.headers["x-request-id"] == "order-77"
    rows = audit(front, "--request-id", "order-77")
    assert [r["event"] for r in rows] == ["publish", "published"]
    assert {r["handle"] for r in rows} == {answer.headers["x-lcguard-handle"]}


def test_a_client_that_hangs_up_leaves_no_segment(front: Front) -> None:
    body = {
        "model": "nano",
        "prompt": NAME,
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
        "lcguard": {"publish": {"audience": "open"}},
    }
    header = front.auth("intake") | {"X-Request-Id": "left-early"}
    with front.http.stream("POST", "/v1/completions", json=body, headers=header) as answer:
        next(answer.iter_raw())
    rows = wait_for(lambda: len(found := audit(front, "--request-id", "left-early")) == 2 and found)
    assert [r["event"] for r in rows] == ["publish", "aborted"]
    gone = front.ask(front.auth("open"), ASK_SSN, rows[0]["handle"])
    assert error(gone) == (404, "no_segment")


def audit(front: Front, *options: str) -> list[dict[str, Any]]:
    """Rows of ``lcguard audit show``."""
    command = [
        sys.executable,
        "-m",
        "lcguard.cli",
        "audit",
        "show",
        "--json",
        "--dir",
        str(front.site.folder),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def python_for(name: str) -> str:
    """The interpreter that has what an example imports; skips where none has."""
    if name.startswith("adk"):
        if not ADK.exists():
            pytest.skip("google-adk is not there: make adk")
        return str(ADK)
    package = name.partition("_")[0]
    pytest.importorskip({"agents": "agents.testing", "two": "openai"}.get(package, package))
    return sys.executable


@pytest.mark.parametrize("name", ["two_agents.py", "langgraph_intake.py", "adk_intake.py"])
def test_the_examples_run(front: Front, name: str) -> None:
    keys = {
        f"{a.upper()}_KEY": front.auth(a, "unwritten")["Authorization"].removeprefix("Bearer ")
        for a in ("intake", "billing", "scheduling", "mallory")
    }
    done = subprocess.run(
        [python_for(name), str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        env=os.environ | keys | {"LCGUARD_URL": f"{front.url}/v1", "PYTHONPATH": str(ROOT)},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([x for x in lines if "back pain" in x]) == 1, done.stdout
    assert SSN not in done.stdout
    assert len([x for x in lines if "XXXX" in x]) == 1, done.stdout
    if name == "two_agents.py":
        assert lines[-1].startswith("mallory -> 403 segment ")


@contextmanager
def recorded(url: str, key: str) -> Iterator[tuple[str, list[str]]]:
    """An address that passes requests on to ``url``, and the bodies of those with a key."""
    bodies = list[str]()

    class Relay(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["authorization"] == key:
                bodies.append(body.decode())
            answer = httpx.post(
                url + self.path,
                content=body,
                headers={k: self.headers[k] for k in ("authorization", "content-type")},
                timeout=120,
            )
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["langgraph", "agents_sdk", "ag2", "adk"])
def test_a_program_is_guarded_by_five_lines(front: Front, name: str) -> None:
    python = python_for(name)
    # ADK's callback asks the proxy, whose policy then has the edge
    tenant = "clerks" if name == "adk" else "unwritten"
    keys = {a: front.auth(a, tenant)["Authorization"] for a in ("intake", "billing")}
    seen = {}
    for kind in ("plain", "text"):
        with recorded(front.url, keys["billing"]) as (url, bodies):
            done = subprocess.run(
                [python, f"{name}_{kind}.py"],
                capture_output=True,
                text=True,
                cwd=ROOT / "examples",
                env=os.environ
                | {f"{a.upper()}_KEY": key.removeprefix("Bearer ") for a, key in keys.items()}
                | {"LCGUARD_URL": f"{url}/v1", "LCGUARD_KEY": "ab" * 32}
                | {"PYTHONPATH": str(ROOT)},
                timeout=300,
            )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "billing: " in done.stdout
        seen[kind] = bodies
    assert len(seen["plain"]) == len(seen["text"]) > 0
    assert all(SSN in body and "Ada Long" in body for body in seen["plain"])
    assert all("back pain" in body for body in seen["text"])
    assert not any(SSN in body or "Ada" in body for body in seen["text"])
