"""Every option of the proxy, of an edge and of a key has a test here that shows its effect."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcguard.agents.nano.load import model_path
from lcguard.commands.keys import revoke
from lcguard.commands.live_servers import UPSTREAM_KEY, Running, Site, free_port
from lcguard.commands.serve import NANO_ARGS
from lcguard.handoff.policy import Edge
from lcguard.server.access.keyring import KeyEntry
from lcguard.server.leakage.edge_state import EdgeLeakage, save_state
from lcguard.server.limits.key_limits import Limits
from lcguard.server.settings import ServerSettings
from lcguard.store import open_store
from tests.engine import needs_vllm
from tests.paths import TESTS
from tests.server.proxy import (
    COMPLAINT,
    NOTE,
    POLICY,
    SSN,
    Front,
    error,
    front_of,
    rewrite,
    wait_for,
)
from tests.server.proxy_client import engine_of

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ASK_COMPLAINT, ASK_SSN = "What is the chief complaint?", "What is the SSN?"
FOREVER = 2000
"""Tokens; seconds long."""

_UPSTREAM, _CANARIES = "test_upstream.py::", "test_canaries.py"
OPTIONS = {
    "host": "test_host_and_port",
    "port": "test_host_and_port",
    "policy": "test_a_proxy_with_another_policy_than_the_engine_is_not_ready",
    "keys": "test_keys_and_database_say_where_the_files_are",
    "database": "test_keys_and_database_say_where_the_files_are",
    "database_timeout_s": "test_a_locked_database_refuses_handoffs_after_database_timeout_s",
    "store": "test_a_proxy_with_another_store_than_the_engine_is_not_ready",
    "store_timeout_s": "test_proxy_slots.py::test_a_stopped_store_keeps_nobody_else_waiting",
    "store_max_bytes": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "prefix_cache": "test_prefix_cache_is_shared_within_a_tenant_where_the_option_says_so",
    "metrics_auth": "test_metrics_auth",
    "drain_s": "test_a_running_stream_ends_whole_within_drain_s",
    "upstream.url": "test_host_and_port",
    "upstream.api_key_env": "test_a_proxy_without_the_engines_key_is_not_ready",
    "upstream.connect_timeout_s": _UPSTREAM
    + "test_a_server_that_does_not_take_connections_runs_into_connect_timeout_s",
    "upstream.read_timeout_s": _UPSTREAM
    + "test_silence_in_the_middle_of_an_answer_runs_into_read_timeout_s",
    "upstream.total_timeout_s": _UPSTREAM
    + "test_a_trickle_is_no_silence_and_ends_at_total_timeout_s",
    "upstream.retries": _UPSTREAM
    + "test_a_dropped_connection_is_tried_again_as_often_as_the_option_says",
    "limits.max_body_bytes": "test_max_body_bytes",
    "limits.max_output_tokens": "test_proxy_limits.py::test_all_that_one_request_generates_counts",
    "limits.body_timeout_s": "test_body_timeout_s_for_head_and_body",
    "limits.write_timeout_s": "test_proxy_slots.py::"
    "test_a_client_that_does_not_read_loses_its_place",
    "limits.redact_timeout_s": "test_cpu_worker.py::"
    "test_the_loop_goes_on_and_nobody_waits_past_the_deadline",
    "limits.key_concurrency": "test_proxy_slots.py::test_a_key_has_a_limit_without_saying_one",
    "limits.max_concurrency": "test_proxy_slots.py::test_the_line_before_vllm_has_an_end",
    "limits.max_queue": "test_proxy_slots.py::test_the_line_before_vllm_has_an_end",
    "limits.queue_timeout_s": "test_proxy_slots.py::test_who_waits_too_long_for_a_place_is_refused",
    "canaries.enabled": "test_canaries_run_where_they_are_enabled",
    "canaries.interval_s": _CANARIES,
    "canaries.timeout_s": _CANARIES,
    "canaries.threshold": "test_on_leak_refuses_or_redacts_on_a_closed_edge",
    "canaries.train_records": _CANARIES,
    "canaries.test_records": _CANARIES,
    "canaries.attack": _CANARIES,
    "engine.model": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.served_model_name": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.guards": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.args": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.nice": "test_lcguard_serve_starts_the_engine_that_its_options_describe",
    "engine.start_timeout_s": "test_start_timeout_s_and_restarts",
    "engine.restarts": "test_start_timeout_s_and_restarts",
    "engine.restart_window_s": "test_engine_restarts.py::"
    "test_deaths_are_counted_within_a_window_and_none_is_the_last",
}
EDGE_OPTIONS = {
    "source": "test_tenant_source_and_audience_choose_the_rule",
    "audience": "test_tenant_source_and_audience_choose_the_rule",
    "tenant": "test_tenant_source_and_audience_choose_the_rule",
    "forbid": "test_forbid_and_guard",
    "declassify": "test_proxy_lineage.py::test_declassifying_is_in_the_audit",
    "guard": "test_forbid_and_guard",
    "derive": "test_derive_lets_the_band_pass",
    "on_failure": "test_on_failure_blocks_and_nothing_else",
    "ttl_s": "test_ttl_s_of_the_policy_bounds_the_requests",
    "fixed_length": "test_fixed_length_is_refused_inside_vllm",
    "detect": "test_detect_presidio_finds_the_ssn",
    "max_segments": "test_max_segments_within_window_s",
    "window_s": "test_max_segments_within_window_s",
    "max_draws": "test_max_draws_of_one_record",
    "length_bucket": "test_length_bucket_of_one_shows_the_length",
    "on_leak": "test_on_leak_refuses_or_redacts_on_a_closed_edge",
}
KEY_OPTIONS = {
    "tenant": "test_proxy.py::test_tenants_are_apart_from_end_to_end",
    "agent": "test_proxy.py::test_one_publishes_another_consumes_and_a_third_is_refused",
    "role": "test_proxy.py::test_who_lists_inspects_and_revokes",
    "expires_at": "test_a_key_expires",
    "models": "test_models_of_a_key",
    "limits.requests_per_min": "test_requests_per_min",
    "limits.tokens_per_min": "test_tokens_per_min_counts_prompts_of_streams_too",
    "limits.concurrency": "test_concurrency_of_a_key",
}


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
        if where == _CANARIES:
            text = _text_of(where)
            assert option.partition(".")[2] in text, option
        elif file:
            assert f"def {name}(" in _text_of(file), option
        else:
            assert callable(globals().get(name)), option


# --- server.yaml ---


@pytest.fixture(scope="module")
def tight(site: Site, engine: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A proxy with narrow limits and files of its own, and two edges that canaries closed."""
    folder = tmp_path_factory.mktemp("tight")
    shut = [
        EdgeLeakage("default", "intake", name, since_s=1.0, state="closed", reason="a test")
        for name in ("shut", "shut-redacted")
    ]
    save_state(folder / "leakage.json", {e.name: e for e in shut})
    (folder / "book").mkdir()
    with front_of(
        with_key(site, "OTHER_KEY", engine.api_key),
        None,
        folder,
        host="0.0.0.0",
        keys="people/keys.yaml",
        database="book/audit.sqlite",
        metrics_auth=False,
        database_timeout_s=0.2,
        canaries={"enabled": False, "threshold": 0.35},
        upstream={"url": engine.url, "api_key_env": "OTHER_KEY"},
        limits={
            "max_body_bytes": 20000,
            "max_output_tokens": FOREVER,
            "body_timeout_s": 4,
        },
    ) as found:
        yield found


def with_key(site: Site, name: str, key: str) -> Site:
    """The same site under an environment with the engine's key."""
    other = Site(site.folder)
    other.environment = {k: v for k, v in site.environment.items() if k != UPSTREAM_KEY}
    other.environment[name] = key
    return other


def first_reason(front: Front) -> str:
    """Why a proxy that will not become ready is not."""

    def look() -> str:
        with_reason = [c["detail"] for c in front.ready()["checks"].values() if not c["ok"]]
        return with_reason[0] if with_reason and "not checked" not in with_reason[0] else ""

    wait_for(lambda: front.running.get("/livez")[0] == 200)
    return str(wait_for(look))


@contextmanager
def stream(front: Front, who: dict[str, str], n: int = FOREVER) -> Iterator[httpx.Response]:
    """A long stream that has begun."""
    body = {"model": "nano", "prompt": "Once", "max_tokens": n, "ignore_eos": True, "stream": True}
    with front.http.stream("POST", "/v1/completions", json=body, headers=who) as answer:
        assert answer.status_code == 200
        yield answer


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
            "nice": 7,
        },
    }
    own.key("nobody")
    with own.proxy(**settings) as running:
        before = os.getpriority(os.PRIO_PROCESS, running.process.pid)
        pid, _ = engine_of(running)
        assert os.getpriority(os.PRIO_PROCESS, pid) == max(7, before)
        assert before != 7
        front = Front(own, running)
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
        front = Front(own, running)
        wait_for(lambda: "start_timeout_s=0.5" in front.ready()["reasons"][0])
        assert front.http.get("/readyz").status_code == 503
        assert front.http.get("/livez").status_code == 200


# --- the policy's edges ---


def test_tenant_source_and_audience_choose_the_rule(front: Front) -> None:
    def edge(tenant: str, audience: str) -> Any:
        made = front.publish(front.auth("intake", tenant), audience)
        return made.json()["lcguard"]["published"]

    assert edge("default", "clerk")["forbid"] == []
    assert edge("default", "unheard-of")["guard"] == "gate"
    assert len(edge("default", "unheard-of")["forbid"]) == 7
    assert edge("default", "partner")["guard"] == "gate"
    assert edge("acme", "partner")["guard"] == "identity"


def test_forbid_and_guard(front: Front) -> None:
    intake = front.auth("intake")
    for audience, forbids in (("open", False), ("hidden", True)):
        who, said = front.auth(audience), []
        for _ in range(3):
            handle = front.handle(intake, audience)
            said.append([front.answer(who, q, handle) for q in (ASK_COMPLAINT, ASK_SSN)])
        # each publication draws its own noise, and the gate costs an answer now and then
        assert any(COMPLAINT in complaint for complaint, _ in said)
        assert all((SSN in number) is not forbids for _, number in said)
    strict = front.publish(intake, "strict").json()["lcguard"]["published"]
    hidden = front.publish(intake, "hidden").json()["lcguard"]["published"]
    assert (strict["guard"], hidden["guard"]) == ("residual", "gate")
    assert strict["guard_digest"] != hidden["guard_digest"]
    tightened = front.publish(intake, "open", forbid=["health"]).json()["lcguard"]["published"]
    assert tightened["forbid"] == ["health"]


def test_derive_lets_the_band_pass(front: Front) -> None:
    note = "Employee record. The name is Quella Brandt. Current salary: 180000. Job title: Analyst."
    right = {}
    for audience in ("banded", "hidden"):
        who = front.auth(audience)
        handles = [front.handle(front.auth("intake"), audience, note) for _ in range(6)]
        right[audience] = sum(
            "high" in front.answer(who, "What is the salary band?", h) for h in handles
        )
        assert not any("180000" in front.answer(who, "What is the salary?", h) for h in handles)
    assert right["banded"] >= 4
    assert right["banded"] > right["hidden"]


def test_on_failure_blocks_and_nothing_else(site: Site, front: Front) -> None:
    """A guard that the engine lacks: no hop, and nothing raw in the store."""
    with pytest.raises(ValueError, match="on_failure"):
        Edge.model_validate_json(
            json.dumps({"source": "a", "audience": "b", "forbid": [], "on_failure": "pass"})
        )
    before = set(open_store(site.store).handles())
    assert front.publish(front.auth("intake"), "padded").status_code == 400
    assert set(open_store(site.store).handles()) <= before


def test_ttl_s_of_the_policy_bounds_the_requests(front: Front) -> None:
    intake, brief = front.auth("intake"), front.auth("brief")
    made = front.publish(intake, "brief", ttl_s=1000).json()["lcguard"]["published"]
    assert made["expires_at_s"] <= time.time() + 3
    wait_for(lambda: error_of(front.ask(brief, ASK_SSN, made["handle"])) == (404, "no_segment"))


def error_of(answer: httpx.Response) -> tuple[int, str] | None:
    return None if answer.status_code == 200 else error(answer)


def test_fixed_length_is_refused_inside_vllm(front: Front) -> None:
    answer = front.publish(front.auth("intake"), "padded")
    assert answer.status_code == 400
    assert "fixed_length" in answer.text


def test_detect_presidio_finds_the_ssn(front: Front) -> None:
    pytest.importorskip("presidio_analyzer")
    intake, who = front.auth("intake"), front.auth("screened")
    # no detector finds all of a category, so the publisher says what is left to hide
    unsaid = front.publish(intake, "screened")
    assert error(unsaid) == (400, "spans")
    assert "government_id" in unsaid.json()["error"]["message"]
    made = front.publish(intake, "screened", secrets=[]).json()["lcguard"]["published"]
    assert (made["guard"], made["redacted_spans"]) == ("redact", 1)
    assert SSN not in front.answer(who, ASK_SSN, made["handle"])
    assert COMPLAINT in front.answer(who, ASK_COMPLAINT, made["handle"])
    # beside what it finds, what the publisher names
    both = front.publish(intake, "screened", secrets=[COMPLAINT]).json()["lcguard"]["published"]
    assert both["redacted_spans"] == 2
    assert COMPLAINT not in front.answer(who, ASK_COMPLAINT, both["handle"])


def test_redact_without_a_detector_takes_secrets(front: Front) -> None:
    intake, who = front.auth("intake"), front.auth("named")
    unsaid = front.publish(intake, "named")
    assert error(unsaid) == (400, "spans")
    assert "government_id, health" in unsaid.json()["error"]["message"]
    assert error(front.publish(intake, "named", secrets=["not there"])) == (400, "spans")
    spelled = NOTE.replace(SSN, "9\u200b12\u201155\n1029")
    made = front.publish(intake, "named", spelled, secrets=[SSN]).json()["lcguard"]["published"]
    assert made["redacted_spans"] == 1
    assert "1029" not in front.answer(who, ASK_SSN, made["handle"])
    handle = front.handle(intake, "named", secrets=[SSN])
    assert SSN not in front.answer(who, ASK_SSN, handle)
    assert COMPLAINT in front.answer(who, ASK_COMPLAINT, handle)
    elsewhere = front.publish(intake, "open", secrets=[SSN])
    assert error(elsewhere) == (400, "bad_handoff")


def test_where_no_guard_is_named_it_is_redact(site: Site, front: Front) -> None:
    intake, who = (front.auth(name, "unwritten") for name in ("intake", "billing"))
    kept = sorted((site.folder / "segments").glob("*"))
    unsaid = front.publish(intake, "billing")
    assert error(unsaid) == (400, "spans")
    message = unsaid.json()["error"]["message"]
    assert "lcguard.publish.secrets, [] for none, or choose another guard" in message
    assert "\n" not in message
    assert sorted((site.folder / "segments").glob("*")) == kept
    made = front.publish(intake, "billing", secrets=[SSN]).json()["lcguard"]["published"]
    assert (made["guard"], made["redacted_spans"]) == ("redact", 1)
    assert SSN not in front.answer(who, ASK_SSN, made["handle"])


def test_max_segments_within_window_s(front: Front) -> None:
    intake, who = front.auth("intake"), front.auth("frugal")
    first, second = (front.handle(intake, "frugal") for _ in range(2))
    for _ in range(2):  # the same one again is free
        assert SSN in front.answer(who, ASK_SSN, first)
    refused = front.ask(who, ASK_SSN, second)
    assert error(refused) == (403, "budget")
    assert 1 <= int(refused.headers["retry-after"]) <= 4
    other = front.handle(front.auth("analyst"), "frugal")  # the budget is of one source
    assert SSN in front.answer(who, ASK_SSN, other)
    wait_for(lambda: front.ask(who, ASK_SSN, second).status_code == 200)  # the window passes


def test_max_draws_of_one_record(front: Front) -> None:
    """Two by default; equal text, a growing one and another record are no further draw."""
    intake, who = front.auth("intake"), front.auth("averager")

    def ask(note: str, **publish: Any) -> Any:
        return front.ask(who, ASK_COMPLAINT, front.handle(intake, "averager", note, **publish))

    for note in (NOTE, NOTE, f"Mind: {NOTE}", NOTE):
        assert ask(note).status_code == 200, note
    for note in (f"Again: {NOTE}", NOTE.replace("The", "This: the")):
        refused = ask(note)
        assert error(refused) == (403, "budget")
        assert int(refused.headers["retry-after"]) > 86400
        assert SSN not in refused.text
    assert ask(f"Mind: {NOTE}").status_code == 200
    assert ask(NOTE.replace(SSN, "912-55-1030")).status_code == 200
    for i in range(3):
        got = ask(f"Visit {i}. {NOTE}", record="patient-17")
        assert got.status_code == (200 if i < 2 else 403)
    talk = [{"role": "system", "content": f"Board: {NOTE.replace('Ada', 'Eva')}"}]
    for turn in range(4):
        publish = {"publish": {"audience": "averager"}}
        made = front.chat(
            intake, "", publish, max_tokens=1, messages=talk, add_generation_prompt=False
        )
        handle = made.json()["lcguard"]["published"]["handle"]
        assert front.ask(who, ASK_COMPLAINT, handle).status_code == 200
        talk += [
            {"role": "user", "content": f"Question {turn}?"},
            {"role": "assistant", "content": "not stated"},
        ]
    # without noise there is nothing to average
    handles = [front.handle(intake, "open", f"Note {i}: {NOTE}") for i in range(4)]
    for handle in handles:
        assert front.ask(front.auth("open"), ASK_COMPLAINT, handle).status_code == 200


def test_length_bucket_of_one_shows_the_length(front: Front) -> None:
    made = front.publish(front.auth("intake"), "measured").json()["lcguard"]["published"]
    path = f"/lcguard/v1/segments/{made['handle']}"
    shown = front.http.get(path, headers=front.auth("measured")).json()
    assert shown["n_tokens"] == made["n_tokens"]


def test_on_leak_refuses_or_redacts_on_a_closed_edge(tight: Front) -> None:
    pytest.importorskip("presidio_analyzer")
    intake = tight.auth("intake")
    assert error(tight.publish(intake, "shut")) == (403, "edge_closed")
    made = tight.publish(intake, "shut-redacted", secrets=[]).json()["lcguard"]["published"]
    assert made["guard"] == "redact"
    who = tight.auth("shut-redacted")
    assert SSN not in tight.answer(who, ASK_SSN, made["handle"])
    assert COMPLAINT in tight.answer(who, ASK_COMPLAINT, made["handle"])
    # another source's edges are open
    assert tight.publish(tight.auth("analyst"), "shut").status_code == 200
    edge = {"tenant": "default", "source": "intake", "audience": "shut"}
    admin = tight.auth("root", role="admin")
    leakage = tight.http.get("/lcguard/v1/leakage", headers=admin).json()
    assert leakage["threshold"] == 0.35
    shown = leakage["edges"]
    assert [e["state"] for e in shown if e["audience"] == "shut" and e["source"] == "intake"] == [
        "closed"
    ]
    opened = tight.http.post("/lcguard/v1/leakage/reopen", json=edge, headers=admin)
    assert opened.json() == {"state": "open"}
    assert tight.publish(intake, "shut").status_code == 200


def test_a_changed_policy_refuses_what_was_published_before(site: Site, front: Front) -> None:
    intake, who = front.auth("intake"), front.auth("changing")
    handle = front.handle(intake, "changing")
    assert SSN in front.answer(who, ASK_SSN, handle)
    stays = front.handle(intake, "open")
    edges = [e for e in POLICY["edges"] if e["audience"] != "changing"]
    changed = {"source": "*", "audience": "changing", "forbid": ["government_id"], "guard": "gate"}
    try:
        rewrite(site.policy, POLICY | {"edges": [*edges, changed]})
        wait_for(lambda: error_of(front.ask(who, ASK_SSN, handle)) == (403, "policy_changed"))
        assert SSN in front.answer(front.auth("open"), ASK_SSN, stays)
        # the engine follows the same file
        made = wait_for(
            lambda: (r := front.publish(intake, "changing")).status_code == 200 and r.json()
        )
        assert made["lcguard"]["published"]["guard"] == "gate"
    finally:
        rewrite(site.policy, POLICY)
    wait_for(lambda: front.ask(who, ASK_SSN, handle).status_code == 200)
    wait_for(lambda: front.ready()["ready"])


def test_a_broken_policy_leaves_the_one_before_in_force(site: Site, front: Front) -> None:
    intake, who = front.auth("intake"), front.auth("open")
    try:
        site.policy.write_text("version: 1\nedgs: []\n")
        reasons = wait_for(lambda: front.ready()["reasons"])
        assert "edgs" in reasons[0]
        assert "the one before is in force" in reasons[0]
        assert SSN in front.answer(who, ASK_SSN, front.handle(intake, "open"))
    finally:
        rewrite(site.policy, POLICY)
    wait_for(lambda: front.ready()["ready"])


# --- keys ---


def test_a_new_key_works_and_a_revoked_one_does_not_without_a_restart(front: Front) -> None:
    keys = front.site.folder / "keys.yaml"
    text = front.site.key("temp")
    header = {"Authorization": f"Bearer {text}"}
    wait_for(lambda: front.chat(header, "hello").status_code == 200)
    revoke(keys, text.split("_")[1])
    wait_for(lambda: error_of(front.chat(header, "hello")) == (401, "unauthorized"))
    assert front.http.get("/lcguard/v1/contract", headers=header).status_code == 401


def test_a_key_expires(front: Front) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=5)
    who = front.auth("temp", expires_at=until)
    gone = wait_for(lambda: (r := front.chat(who, "hello")).status_code == 401 and r)
    assert datetime.now(UTC) >= until
    assert "expired" in gone.json()["error"]["message"]


def test_models_of_a_key(front: Front) -> None:
    names = {}
    for model in ("nano", "other"):
        who = front.auth("temp", models=(model,))
        found = front.http.get("/v1/models", headers=who).json()["data"]
        names[model] = [m["id"] for m in found]
        answer = front.chat(who, "hello")
        assert answer.status_code == (200 if model == "nano" else 403)
    assert names == {"nano": ["nano"], "other": []}
    assert error(answer) == (403, "model")


def test_a_key_for_some_models_has_to_name_one(front: Front) -> None:
    """vLLM takes its own model where a request names none."""
    who = front.auth("temp", models=("other",))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for model in ({}, {"model": None}, {"model": ""}):
        answer = front.http.post("/v1/chat/completions", json=body | model, headers=who)
        assert answer.status_code in (400, 403), answer.text


def test_requests_per_min(front: Front) -> None:
    who = front.auth("temp", limits=Limits(requests_per_min=2))
    answers = [front.chat(who, "hello") for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert error(answers[2]) == (429, "limited")


def test_tokens_per_min_counts_prompts_of_streams_too(front: Front) -> None:
    who = front.auth("temp", limits=Limits(tokens_per_min=500))
    assert error(front.chat(who, "hello", max_tokens=600)) == (413, "too_large")
    long = "word " * 220
    first = front.chat(who, long, max_tokens=4, stream=True)
    assert first.status_code == 200
    second = front.chat(who, long, max_tokens=4)
    assert error(second) == (429, "limited")
    assert 1 <= int(second.headers["retry-after"]) <= 60


def test_a_stream_that_is_left_is_not_free(front: Front) -> None:
    who = front.auth("temp", limits=Limits(tokens_per_min=FOREVER + 500))
    with stream(front, who) as answer:
        next(answer.iter_raw())
    admin = front.auth("root", role="admin")
    wait_for(lambda: "\nlcguard_in_flight 0.0\n" in front.http.get("/metrics", headers=admin).text)
    assert error(front.chat(who, "hello", max_tokens=1000)) == (429, "limited")


def test_prompt_log_probabilities_do_not_hide_the_count(front: Front) -> None:
    """vLLM writes them behind its count of tokens, and they are long."""
    who = front.auth("temp", limits=Limits(tokens_per_min=1000))
    body = {"prompt_logprobs": 5, "max_tokens": 4}
    assert front.complete(who, "word " * 600, **body).status_code == 200
    assert error(front.complete(who, "word " * 600, **body)) == (429, "limited")


def test_concurrency_of_a_key(front: Front) -> None:
    who = front.auth("temp", limits=Limits(concurrency=1))
    with stream(front, who):
        refused = front.chat(who, "hello")
        assert error(refused) == (429, "limited")
        assert int(refused.headers["retry-after"]) >= 1
        assert front.chat(front.auth("intake"), "hello").status_code == 200
    wait_for(lambda: front.chat(who, "hello").status_code == 200)


def test_the_port_is_free_to_choose(tmp_path: Path) -> None:
    from lcguard.commands.serve import load_settings

    port = free_port()
    settings = load_settings(tmp_path, None, [f"port={port}", "host=127.0.0.9"], None)
    assert (settings.host, settings.port) == ("127.0.0.9", port)
