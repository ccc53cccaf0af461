"""The proxy's fault drill: what fails, fails closed, says why, and works again afterwards.

One real ``lcguard serve`` with its own vLLM. After every fault the audit must be whole, every
acknowledged publish in it, and no segment in the store that no guard has rewritten. The tests that
kill vLLM stand last: the last one leaves none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lcguard.agents.backends.hf import load_backend
from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Site
from lcguard.guards.shipped import guard_folder
from lcguard.handoff.policy import load_policy
from lcguard.store.files import FileStore
from tests.engine import needs_vllm
from tests.server.drill import (
    BODY_TIMEOUT_S,
    LONG,
    NOTE,
    START_S,
    STORE_BYTES,
    WAIT_S,
    Drill,
    refused,
    rules,
)
from tests.server.malformed import JUNK, _send_many, _takes_input
from tests.server.proxy_client import (
    DONE,
    Answer,
    Client,
    asked,
    audit_rows,
    engine_of,
    n_generated,
    n_running,
    until,
)
from tests.server.raw_requests import connect, drip, head, send_whole

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
N_MALFORMED = 2000


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    guard = folder / "gate"
    shutil.copytree(guard_folder("nano:gate"), guard)
    site = Site(folder, rules())
    keys = [site.key("intake"), site.key("billing")]
    with site.proxy(
        engine={"guards": {"gate": str(guard)}, "restarts": 2},
        store_max_bytes=STORE_BYTES,
        limits={"body_timeout_s": BODY_TIMEOUT_S},
        database_timeout_s=1.0,
    ) as proxy:
        yield Drill(site, proxy, guard, *(Client(proxy.url, key) for key in keys))


@pytest.fixture
def drill(running: Drill) -> Iterator[Drill]:
    running.until_ready()
    running.works()
    yield running
    running.check()


def test_raw_kv_is_told_from_guarded(drill: Drill) -> None:
    """What ``Drill.check`` relies on."""
    source = load_backend("nano").source
    kv = source.prefill([[5, 900, 33, 7, 1200]])
    assert drill.is_raw(kv.values[0]).all()
    assert not drill.is_raw(kv.values[0] + 0.5).any()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_vllm_stops_for_a_client_that_hangs_up(drill: Drill, stream: bool) -> None:
    _, engine = engine_of(drill.proxy)
    before = {r["seq"] for r in audit_rows(drill.database)}
    n_before = n_generated(engine)
    handoff = {"publish": {"audience": "billing"}}
    if stream:
        with drill.publisher.stream(NOTE, handoff, LONG) as events:
            next(events)
            assert n_running(engine) == 1
    else:
        hung = send_whole(drill, asked(NOTE, handoff, LONG))
        until(lambda: n_running(engine) == 1, WAIT_S, "vLLM computes")
        hung.close()
    until(lambda: n_running(engine) == 0, WAIT_S, "vLLM stops")
    assert n_generated(engine) - n_before < LONG, "vLLM went on to the end"

    def new(event: str) -> list[str]:
        rows = audit_rows(drill.database, "event = ?", event)
        return [r["handle"] for r in rows if r["seq"] not in before]

    until(lambda: new("aborted"), WAIT_S, "the audit says so")
    (handle,) = new("aborted")
    assert new("publish") == [handle]
    assert new("published") == []
    # vLLM may have been about to store it
    assert handle not in FileStore(drill.store).handles()
    assert drill.audience.consume(handle).status == 404


def test_hung_up_publishes_leave_nothing(drill: Drill) -> None:
    """Clients that leave at once, or after so many pieces: before, while or after it is stored."""
    before = {r["seq"] for r in audit_rows(drill.database)}
    handoff, n = {"publish": {"audience": "billing"}}, 18
    for i in range(n):
        if i % 3 == 0:
            hung = send_whole(drill, asked(f"{NOTE} {i}", handoff, 1 + i))
            time.sleep(0.01 * i)  # somewhere on its way; all moments are right
            hung.close()
            continue
        with drill.publisher.stream(f"{NOTE} {i}", handoff, LONG) as events:
            for _ in range(i % 4):
                next(events)
    _, engine = engine_of(drill.proxy)

    def ended() -> dict[str, str]:
        rows = [r for r in audit_rows(drill.database) if r["seq"] not in before and r["handle"]]
        return {r["handle"]: r["event"] for r in rows}

    until(lambda: n_running(engine) == 0, WAIT_S, "vLLM is idle")
    until(lambda: not {"publish"} & set(ended().values()), WAIT_S, f"all ended: {ended()}")
    left = [h for h, event in ended().items() if event in ("aborted", "failed")]
    assert left
    store = FileStore(drill.store)
    kept = set(store.handles())
    assert not kept & set(left)
    for handle in left:
        assert drill.audience.consume(handle).status == 404


def test_a_body_that_drips_is_refused(drill: Drill) -> None:
    with connect(drill) as slow:
        slow.sendall(head(drill, 1000))
        got, spent_s = drip(slow, b"{" + b" " * 999)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 2 s" in got
    assert spent_s >= BODY_TIMEOUT_S - 1


def test_a_head_that_drips_is_hung_up_on(drill: Drill) -> None:
    with connect(drill) as slow:
        got, spent_s = drip(slow, head(drill, 10) * 2)
    assert got == b""
    assert spent_s >= BODY_TIMEOUT_S - 1


def test_no_body_is_read_for_whoever_has_no_right_to_send_it(drill: Drill) -> None:
    """A route of operators: neither size nor time of a body counts before the key does, and who
    goes on sending is hung up on."""
    with connect(drill) as slow:
        slow.sendall(head(drill, 10**9, "/lcguard/v1/leakage/reopen"))
        got, _ = drip(slow, b"{" + b" " * 99)
    assert got.startswith(b"HTTP/1.1 403 ")


def test_a_segment_that_does_not_fit_the_store(drill: Drill) -> None:
    reason = refused(drill.publisher.publish("word " * 1200), 502)
    assert "not stored" in reason
    drill.works()


def test_the_store_is_gone_and_comes_back(drill: Drill) -> None:
    handle = drill.publisher.publish(NOTE).handle
    away = drill.store.with_name("away")
    drill.store.rename(away)
    drill.store.write_text("no folder")  # root may write anywhere, so modes are no fault to it
    try:
        assert "stored" in refused(drill.publisher.publish(NOTE), 502, 503)
        assert "not possible now" in refused(drill.audience.consume(handle), 502, 503)
        with drill.publisher.stream(NOTE, {"publish": {"audience": "billing"}}) as events:
            seen = list(events)
        assert any("error" in e for e in seen if e != DONE)
        assert not any("lcguard" in e for e in seen if e != DONE)
        assert drill.publisher.ask(NOTE).status == 200
        drill.until_unready(f"{drill.store} is no folder")
    finally:
        drill.store.unlink()
        away.rename(drill.store)
    drill.until_ready()
    assert drill.audience.consume(handle).status == 200


def test_an_altered_guard_stops_publishing(drill: Drill) -> None:
    handle = drill.publisher.publish(NOTE).handle
    with _altered(drill.guard):
        drill.until_unready("guard 'gate' on the disk is not the one that the engine runs")
        n_before = len(drill.stored())
        assert "guard 'gate'" in refused(drill.publisher.publish(NOTE), 503)
        assert len(drill.stored()) == n_before
        assert drill.publisher.ask(NOTE).status == 200
        # made before, by the guard that it says
        assert drill.audience.consume(handle).status == 200
    drill.until_ready()
    drill.works()


class _altered:
    """One bit of the guard's weights is another."""

    def __init__(self, guard: Path) -> None:
        self.file = guard / "guard.safetensors"

    def __enter__(self) -> None:
        self.good = self.file.read_bytes()
        bad = bytearray(self.good)
        bad[-1] ^= 1
        self.file.write_bytes(bad)

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.good)


def test_a_broken_policy_leaves_the_old_one_in_force(drill: Drill) -> None:
    old = load_policy(drill.site.policy)
    handle = drill.publisher.publish(NOTE).handle
    n_rows = len(_policy_rows(drill))

    def in_force() -> Any:
        return drill.publisher.get("/lcguard/v1/policy").json

    drill.site.policy.write_text("version: 1\nedges: [{source: intake, forbit: []}]\n")
    drill.until_unready("forbit")
    assert in_force()["digest"] == old.digest
    drill.works()
    assert drill.audience.consume(handle).status == 200
    until(lambda: len(_policy_rows(drill)) > n_rows, WAIT_S, "the audit says so")
    last = _policy_rows(drill)[-1]
    assert last["verdict"] == "error"
    assert "forbit" in last["reason"]

    # hides one category less, so that engine and proxy must both have read it
    drill.site.policy.write_text(json.dumps(rules(CATEGORIES[1:])))
    new = load_policy(drill.site.policy)
    until(lambda: in_force()["digest"] == new.digest, WAIT_S, "the new policy")
    until(lambda: _policy_rows(drill)[-1]["policy_digest"] == new.digest, WAIT_S, "its row")
    # engine and proxy look by themselves: as long as one has not, nothing is handed over
    until(lambda: drill.publisher.publish(NOTE).status == 200, WAIT_S, "both have it")
    drill.until_ready()
    assert "publish it again" in refused(drill.audience.consume(handle), 403)
    published = drill.publisher.publish(NOTE)
    assert published.json["lcguard"]["published"]["forbid"] == list(CATEGORIES[1:])
    assert drill.audience.consume(published.handle).status == 200
    drill.site.policy.write_text(json.dumps(rules()))
    until(lambda: in_force()["digest"] == old.digest, WAIT_S, "the first policy")
    until(lambda: drill.publisher.publish(NOTE).status == 200, WAIT_S, "both have it")


def _policy_rows(drill: Drill) -> list[dict[str, Any]]:
    return audit_rows(drill.database, "event = 'policy'")


def test_a_locked_database_stops_handoffs_and_nothing_else(drill: Drill) -> None:
    handle = drill.publisher.publish(NOTE).handle
    n_before = len(drill.stored())
    with closing(sqlite3.connect(drill.database, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            # both give up, rather than wait for the lock, which is held until the end
            assert "locked by another process for 1 s" in refused(
                drill.publisher.publish(NOTE), 503
            )
            assert "locked" in refused(drill.audience.consume(handle), 503)
            assert drill.publisher.ask(NOTE).status == 200
            drill.until_unready("audit")
        finally:
            other.execute("ROLLBACK")
    assert len(drill.stored()) == n_before
    drill.works()


def test_malformed_requests(drill: Drill) -> None:
    """Made from the OpenAPI document; between them, handoffs that must go on working."""
    import schemathesis
    from schemathesis.core.result import Ok
    from schemathesis.generation import GenerationMode

    statuses: dict[int, int] = {}

    def seen(answer: Answer) -> None:
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert answer.status != 500, answer.data
        if answer.status >= 400:
            assert answer.reason

    for path in ("/v1/completions", "/v1/chat/completions", "/lcguard/v1/leakage/reopen"):
        for data in JUNK:
            seen(drill.publisher.request("POST", path, data))
    schema = schemathesis.openapi.from_url(drill.proxy.url + "/openapi.json")
    found = list(schema.get_all_operations())
    operations = [one.ok() for one in found if isinstance(one, Ok)]
    assert len(operations) == len(found)
    weights = {"/v1/completions": 0.4, "/v1/chat/completions": 0.4}
    others = [o for o in operations if o.path not in weights and _takes_input(o)]
    assert others
    for operation in [o for o in operations if o.path in weights] + others:
        n = int(N_MALFORMED * weights.get(operation.path, 0.2 / len(others))) + 1
        _send_many(operation, GenerationMode.NEGATIVE, n, drill, seen)
        drill.works()
    assert sum(statuses.values()) - statuses.get(401, 0) >= N_MALFORMED, statuses
    assert statuses.get(400, 0) > N_MALFORMED / 2, statuses
    assert drill.readyz()[0] == 200


def killed_while_it_answers(drill: Drill) -> list[list[Any]]:
    """What is left of two streams whose engine is killed. Killed again where one of them was over
    before: how fast the engine writes is no part of this."""
    plain, publish = drill.publisher, {"publish": {"audience": "billing"}}
    for _ in range(3):
        with plain.stream(NOTE, None, LONG) as one, plain.stream(NOTE, publish, LONG) as two:
            assert "error" not in next(one)
            assert "error" not in next(two)
            os.killpg(engine_of(drill.proxy)[0], signal.SIGKILL)
            rests = [list(one), list(two)]
        if not any(DONE in rest for rest in rests):
            return rests
        drill.until_unready("engine")
        drill.until_ready(START_S)
    raise AssertionError(f"{LONG} tokens were always written before the engine was killed")


def test_vllm_is_killed_and_starts_again(drill: Drill) -> None:
    pid, _ = engine_of(drill.proxy)
    plain = drill.publisher
    for rest in killed_while_it_answers(drill):
        assert rest[-1]["error"]["message"]
        assert rest[-1]["error"]["code"].startswith("upstream")
    drill.until_unready("engine")
    assert refused(plain.ask(NOTE), 502, 503)
    assert refused(plain.publish(NOTE), 502, 503)
    last = audit_rows(drill.database, "event = 'publish'")[-2:]
    for handle in (row["handle"] for row in last):
        events = [r["event"] for r in audit_rows(drill.database, "handle = ?", handle)]
        assert events == ["publish", "failed"]
        assert handle not in drill.stored()
    drill.until_ready(START_S)
    assert engine_of(drill.proxy)[0] != pid


def test_vllm_does_not_start_on_an_altered_guard(drill: Drill) -> None:
    n_before = len(drill.stored())
    with _altered(drill.guard):
        drill.until_unready("guard")
        os.killpg(engine_of(drill.proxy)[0], signal.SIGKILL)
        drill.until_unready("vLLM ended with 1", START_S)
        _, reason = drill.readyz()
        assert "guard" in reason.partition("vLLM ended with 1")[2]
        assert "vLLM ended with 1" in drill.proxy.log.read_text()
        assert refused(drill.publisher.publish(NOTE), 502, 503)
        assert refused(drill.publisher.ask(NOTE), 502, 503)
    assert len(drill.stored()) == n_before
