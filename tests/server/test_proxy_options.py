"""Every option of the proxy, of an edge and of a key has a test here that shows its effect."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcguard.agents.nano.load import model_path
from lcguard.commands.live_servers import UPSTREAM_KEY, Running, Site
from lcguard.commands.serve import NANO_ARGS
from lcguard.handoff.policy import Edge
from lcguard.server.access.keyring import KeyEntry
from lcguard.server.limits.key_limits import Limits
from lcguard.server.settings import ServerSettings
from tests.engine import needs_vllm
from tests.paths import TESTS
from tests.server.option_cases import FOREVER, first_reason, stream, with_key
from tests.server.option_table import EDGE_OPTIONS, KEY_OPTIONS, OPTIONS, WHOLE_FILES
from tests.server.proxy import (
    NOTE,
    Front,
    error,
    front_of,
    rewrite,
    wait_for,
)
from tests.server.proxy_client import engine_of

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def leaves(kind: Any, prefix: str = "") -> set[str]:
    """Dotted names of all options."""
    out: set[str] = set()
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            out |= leaves(type(default), f"{prefix}{f.name}.")
        else:
            out.add(prefix + f.name)
    return out


def _text_of(name: str) -> str:
    """A file of tests, in whatever folder it lies."""
    (path,) = TESTS.rglob(name)
    return path.read_text()


def test_every_option_has_its_test() -> None:
    assert set(OPTIONS) == leaves(ServerSettings)
    assert set(EDGE_OPTIONS) == set(Edge.model_fields)
    given = set(KeyEntry.model_fields) - {"id", "created_at", "sha256", "limits"}
    assert set(KEY_OPTIONS) == given | {f"limits.{f.name}" for f in dataclasses.fields(Limits)}
    for option, where in (OPTIONS | EDGE_OPTIONS | KEY_OPTIONS).items():
        file, _, name = where.rpartition("::") if "::" in where else ("", "", where)
        if where in WHOLE_FILES:
            text = _text_of(where)
            assert option.partition(".")[2] in text, option
        elif file:
            assert f"def {name}(" in _text_of(file), option
        else:
            assert any(f"def {name}(" in p.read_text() for p in TESTS.rglob("test_*.py")), option


def test_host_and_port(front: Front, tight: Front) -> None:
    port = int(tight.url.rpartition(":")[2])
    assert f"listening on http://0.0.0.0:{port}" in tight.running.log.read_text()
    assert httpx.get(f"http://127.0.0.2:{port}/livez").status_code == 200
    elsewhere = front.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{elsewhere}/livez")  # by default it listens on 127.0.0.1 alone


def test_keys_and_database_say_where_the_files_are(tight: Front) -> None:
    folder = tight.running.log.parent
    tight.handle(tight.auth("intake"), "open")
    assert not (folder / "keys.yaml").exists()
    assert not (folder / "lcguard.sqlite").exists()
    with closing(sqlite3.connect(folder / "book" / "audit.sqlite")) as connection:
        (n,) = connection.execute("SELECT count(*) FROM segments").fetchone()
    assert n >= 1


def test_metrics_auth(front: Front, tight: Front) -> None:
    """A key by default; and edges, and counts of tokens, for an admin's alone."""
    details = ("lcguard_tokens", "lcguard_edge_open", "lcguard_canary_asr", "shut-redacted")
    assert error(front.http.get("/metrics")) == (401, "unauthorized")
    assert error(front.http.get("/metrics", headers=front.auth("intake"))) == (403, "role")
    for answer in (
        front.http.get("/metrics", headers=front.auth("eve", role="auditor")),
        tight.http.get("/metrics"),
        tight.http.get("/metrics", headers=tight.auth("intake")),
    ):
        assert answer.status_code == 200
        assert "lcguard_requests" in answer.text
        assert [name for name in details if name in answer.text] == []
    admin = tight.http.get("/metrics", headers=tight.auth("root", role="admin")).text
    assert [name for name in details if name not in admin] == []


def test_no_client_makes_edges_of_names_it_thinks_of(front: Front) -> None:
    """Neither by a publish that is refused, nor by one to an audience that nobody is."""
    intake, admin = front.auth("intake"), front.auth("root", role="admin")

    def edges() -> set[tuple[str, str]]:
        found = front.http.get("/lcguard/v1/leakage", headers=admin).json()["edges"]
        return {(e["source"], e["audience"]) for e in found}

    assert error(front.publish(intake, "made-up-1", secrets=["x"])) == (400, "bad_handoff")
    assert front.publish(intake, "made-up-2").status_code == 200
    front.auth("made-up-1")
    assert not {name for _, name in edges()} & {"made-up-1", "made-up-2"}
    front.auth("made-up-2")  # an agent after all
    assert ("intake", "made-up-2") in edges()
    assert ("intake", "made-up-1") not in edges()


def test_a_locked_database_refuses_handoffs_after_database_timeout_s(
    front: Front, tight: Front
) -> None:
    for proxy, path, after in (
        (front, "lcguard.sqlite", "for 2 s"),  # the default
        (tight, "book/audit.sqlite", "for 0.2 s"),
    ):
        who = proxy.auth("intake")
        with closing(sqlite3.connect(proxy.running.log.parent / path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            refused = proxy.publish(who, "open")
            assert error(refused) == (503, "unavailable")
            assert after in refused.json()["error"]["message"]
            assert proxy.chat(who, "hello").status_code == 200  # no handoff: nothing to record
            connection.rollback()
        assert proxy.publish(who, "open").status_code == 200


def test_a_proxy_with_another_store_than_the_engine_is_not_ready(
    site: Site, engine: Running, tmp_path: Path
) -> None:
    with front_of(site, engine, tmp_path, ready=False, store=f"file://{tmp_path / 'x'}") as other:
        assert "the same store" in first_reason(other)
        assert other.http.get("/readyz").status_code == 503
        assert error(other.publish(other.auth("intake"), "open")) == (502, "not_stored")


def test_a_proxy_with_another_policy_than_the_engine_is_not_ready(
    site: Site, engine: Running, tmp_path: Path
) -> None:
    path = tmp_path / "other.yaml"
    edge = {"source": "*", "audience": "clerk", "forbid": ["health"], "guard": "gate"}
    rewrite(path, {"version": 1, "edges": [edge]})
    with front_of(site, engine, tmp_path, ready=False, policy=str(path)) as other:
        assert "goes by another policy" in first_reason(other)
        assert error(other.publish(other.auth("intake"), "clerk")) == (502, "wrong_segment")


def test_a_proxy_without_the_engines_key_is_not_ready(
    site: Site, engine: Running, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"url": engine.url, "api_key_env": "OTHER_KEY"}
    wrong = with_key(site, UPSTREAM_KEY, engine.api_key)
    with front_of(wrong, None, tmp_path, ready=False, upstream=settings) as other:
        assert "401" in first_reason(other)


def test_prefix_cache_is_shared_within_a_tenant_where_the_option_says_so(
    site: Site, engine: Running, tmp_path: Path
) -> None:
    """Plain prompts alone: what is published stays its sender's."""
    text = "One prompt that all of them begin with, word for word, again and again. " * 5
    with front_of(site, engine, tmp_path, prefix_cache="tenant") as shared:

        def cached(agent: str, tenant: str, handoff: Any = None) -> int:
            got = shared.complete(shared.auth(agent, tenant), text, lcguard=handoff)
            assert got.status_code == 200, got.text
            return int(got.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("intake", "default") == 0
        assert cached("billing", "default") > 0
        assert cached("intake", "acme") == 0
        assert cached("intake", "default", {"publish": {"audience": "open"}}) == 0
        assert cached("billing", "default", {"publish": {"audience": "open"}}) == 0


@pytest.mark.parametrize("drain_s", [30, 1])
def test_a_running_stream_ends_whole_within_drain_s(
    site: Site, engine: Running, tmp_path: Path, drain_s: int
) -> None:
    whole = drain_s > 1
    with front_of(site, engine, tmp_path, drain_s=drain_s) as proxy:
        # an idle machine makes FOREVER tokens in little more than a second
        with stream(proxy, proxy.auth("intake"), 60 if whole else 2 * FOREVER) as answer:
            pieces = answer.iter_raw()
            data = next(pieces)
            proxy.running.process.send_signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    return httpx.get(f"{proxy.url}/readyz").status_code == 503
                except httpx.TransportError:
                    return True

            wait_for(refused)
            try:
                data += b"".join(pieces)
            except httpx.RemoteProtocolError:
                assert not whole
        assert data.endswith(b"data: [DONE]\n\n") is whole
        assert proxy.running.process.wait(120) == 0


def test_max_body_bytes(tight: Front) -> None:
    who = tight.auth("intake")
    assert tight.chat(who, "a " * 500).status_code == 200
    assert error(tight.chat(who, "a " * 12000)) == (413, "too_large")

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    unsaid = tight.http.post("/v1/completions", content=pieces(), headers=who)
    assert error(unsaid) == (413, "too_large")


def test_body_timeout_s_for_head_and_body(tight: Front) -> None:
    address = ("127.0.0.1", int(tight.url.rpartition(":")[2]))
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        f"Authorization: {tight.auth('intake')['Authorization']}\r\n"
    )
    with socket.create_connection(address, timeout=120) as slow:
        slow.sendall(f"{head}\r\n{{".encode())
        assert b" 408 " in slow.recv(4096)
    with socket.create_connection(address, timeout=120) as slow:
        slow.sendall(head.encode())  # without its empty line
        assert slow.recv(4096) == b""


def test_canaries_run_where_they_are_enabled(
    site: Site, engine: Running, front: Front, tmp_path: Path
) -> None:
    worker = "-m:lcguard.commands.canary"
    small = {"enabled": True, "train_records": 8, "test_records": 8, "interval_s": 3}
    with front_of(site, engine, tmp_path, canaries=small) as proxy:
        proxy.handle(proxy.auth("intake"), "hidden")  # an edge in use is screened
        wait_for(lambda: worker in commands(proxy.running), 60)
        assert worker not in commands(front.running)  # disabled, and older


# --- engine ---


@pytest.mark.slow
def test_lcguard_serve_starts_the_engine_that_its_options_describe(tmp_path: Path) -> None:
    edges = [{"source": "*", "audience": "clerk", "forbid": ["health"], "guard": "residual"}]
    own = Site(tmp_path, {"version": 1, "edges": edges})
    length = NANO_ARGS.index("--max-model-len") + 1
    args = [*NANO_ARGS[:length], "777", *NANO_ARGS[length + 1 :]]
    settings: dict[str, Any] = {
        "store_max_bytes": 200_000,
        "engine": {
            "model": str(model_path()),
            "served_model_name": "small",
            "args": args,
            "guards": {"gate": "nano:gate", "residual": "nano:residual"},
            "unproven": ["residual"],
            "nice": 7,
        },
    }
    own.key("nobody")
    with own.proxy(**settings) as running:
        before = os.getpriority(os.PRIO_PROCESS, running.process.pid)
        pid, _ = engine_of(running)
        assert os.getpriority(os.PRIO_PROCESS, pid) == max(7, before)
        assert before != 7
        with Front(own, running) as front:
            intake = front.auth("intake")
            (served,) = front.http.get("/v1/models", headers=intake).json()["data"]
            assert (served["id"], served["max_model_len"]) == ("small", 777)
            assert served["root"] == str(model_path())
            small = {"model": "small", "messages": [{"role": "system", "content": NOTE}]}
            made = front.publish(intake, "clerk", **{})  # the model is called otherwise
            assert made.status_code == 404
            made = front.chat(
                intake, "", {"publish": {"audience": "clerk"}}, **small, add_generation_prompt=False
            )
            published = made.json()["lcguard"]["published"]
            assert published["guard"] == "residual"
            assert published["unproven"] == "its evaluation says that it leaks"
            first = f"/lcguard/v1/segments/{published['handle']}"
            assert front.http.get(first, headers=intake).status_code == 200
            # further segments push the oldest out of a store of this size
            for _ in range(20):
                again = front.chat(intake, "", {"publish": {"audience": "clerk"}}, **small)
                assert again.status_code == 200, again.text
                if front.http.get(first, headers=intake).status_code == 404:
                    break
            assert front.http.get(first, headers=intake).status_code == 404
            stored = sum(p.stat().st_size for p in (tmp_path / "segments").rglob("*.safetensors"))
            assert 0 < stored < 300_000
            (port,) = {
                line.rpartition(":")[2] for line in commands(running) if line.startswith("--port:")
            }
            direct = httpx.get(f"http://127.0.0.1:{port}/v1/models")
            assert direct.status_code == 401  # its key is the proxy's alone


def commands(running: Running) -> list[str]:
    """``option:value`` of the command lines of the proxy's child processes."""
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    out = []
    for pid in children.read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        out += [f"{a}:{b}" for a, b in pairwise(words)]
    return out


def test_start_timeout_s_and_restarts(tmp_path: Path) -> None:
    own = Site(tmp_path)
    own.key("nobody")
    settings = {"engine": {"start_timeout_s": 0.5, "restarts": 1}}
    with own.proxy(ready=False, **settings) as running:
        wait_for(lambda: "2 times in 600 s" in running.log.read_text())
        assert "vLLM ended with -9: it did not" in running.log.read_text()
        assert running.log.read_text().count("starting it again") == 1
        with Front(own, running) as front:
            wait_for(lambda: "start_timeout_s=0.5" in front.ready()["reasons"][0])
            assert front.http.get("/readyz").status_code == 503
            assert front.http.get("/livez").status_code == 200
