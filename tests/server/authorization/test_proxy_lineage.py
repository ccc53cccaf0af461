"""What restricts a segment after it was published: what stands on it, its edge, its revocation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Running, Site
from lcguard.handoff.grants import make_grant
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.server.authorization.approved_handoff import signed_order
from tests.engine import needs_vllm
from tests.server.proxy import SSN, Front, close_edges, error, front_of
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ASK_SSN = "What is the SSN?"


def kin(front: Front, name: str) -> dict[str, str]:
    return front.auth(name, "kin")


def told_to_bob(front: Front) -> str:
    return front.handle(kin(front, "alice"), "bob")


def bob_to(front: Front, audience: str, *consumed: str, **more: Any) -> httpx.Response:
    """A note of Bob's, on top of what he consumed."""
    handoff = {"consume": list(consumed)} if consumed else {}
    return front.chat(
        kin(front, "bob"),
        "",
        handoff | {"publish": {"audience": audience} | more},
        max_tokens=1,
        messages=[{"role": "system", "content": "Desk: 4."}],
        add_generation_prompt=False,
    )


# -- what travels


def test_bob_does_not_tell_carol_what_alice_told_him(front: Front) -> None:
    note = told_to_bob(front)
    assert SSN in front.answer(kin(front, "bob"), ASK_SSN, note)
    refused = bob_to(front, "carol", note)
    assert error(refused) == (403, "policy")
    assert "declassify" in refused.json()["error"]["message"]
    assert bob_to(front, "carol").status_code == 200  # what is his own


def test_the_gate_guards_what_travels(front: Front) -> None:
    """Bob's edge to Dave forbids nothing, Alice's forbids numbers: so does what stands on hers."""
    made = bob_to(front, "dave", told_to_bob(front)).json()["lcguard"]["published"]
    assert made["forbid"] == ["government_id"]
    own = bob_to(front, "dave").json()["lcguard"]["published"]
    assert own["forbid"] == []
    assert own["policy_digest"] != made["policy_digest"]
    # and two hops on, where nobody names Alice: then everything is forbidden
    further = front.chat(
        kin(front, "dave"),
        "x",
        {"consume": [made["handle"]], "publish": {"audience": "erin"}},
        max_tokens=1,
    )
    assert error(further) == (403, "policy")


def test_an_exact_guard_does_not_pass_on_what_was_consumed(front: Front) -> None:
    """``redact`` hides the spans of the prompt: their neighbours have read the segment."""
    note = told_to_bob(front)
    refused = bob_to(front, "frank", note, secrets=[])
    assert error(refused) == (403, "policy")
    assert "not guarded against government_id" in refused.json()["error"]["message"]
    assert bob_to(front, "frank", secrets=[]).status_code == 200


def test_the_engine_refuses_by_itself(engine: Running, front: Front, site: Site) -> None:
    """Whoever asks it with a right signature: the manifest says what a segment stands on."""
    key = bytes.fromhex(site.environment[KEY_VARIABLE])
    handle, until_s = told_to_bob(front), int(time.time()) + 60
    grant = make_grant(key, handle, "kin/bob", until_s)
    consume = {"agent": "kin/bob", "segments": [{"handle": handle, "grant": grant}]}
    for audience, why in (("carol", "declassify"), ("frank", "not guarded against"), ("dave", "")):
        publish = {"source": "kin/bob", "audience": f"kin/{audience}"}
        publish |= {"spans": []} if audience == "frank" else {}  # type: ignore[dict-item]
        order = signed_order(key, {"consume": consume, "publish": publish}, time.time())
        body = {
            "model": "nano",
            "prompt": "Desk: 4.",
            "max_tokens": 1,
            "kv_transfer_params": {"lcguard": order},
        }
        headers = {"Authorization": f"Bearer {engine.api_key}"}
        answer = httpx.post(engine.url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == (403 if why else 200), answer.text
        assert why in answer.text


def test_declassifying_is_in_the_audit(front: Front) -> None:
    note = told_to_bob(front)
    made = bob_to(front, "erin", note).json()["lcguard"]["published"]
    assert made["forbid"] == []
    database = front.running.log.parent / "lcguard.sqlite"
    (row,) = audit_rows(database, "event = 'declassified' AND handle = ?", made["handle"])
    assert row["audience"] == "erin"
    assert all(c in row["reason"] for c in CATEGORIES)
    own = bob_to(front, "erin").json()["lcguard"]["published"]["handle"]
    assert audit_rows(database, "event = 'declassified' AND handle = ?", own) == []


def test_an_audience_is_not_shown_what_a_segment_stands_on(front: Front) -> None:
    made = bob_to(front, "erin", told_to_bob(front)).json()["lcguard"]["published"]["handle"]
    shown = front.http.get(f"/lcguard/v1/segments/{made}", headers=kin(front, "erin"))
    assert shown.status_code == 200
    assert "lineage" not in shown.json()["manifest"]
    assert "alice" not in shown.text


# -- a closed edge, a revoked segment


def test_a_closed_edge_delivers_nothing_that_was_published_before(
    site: Site, engine: Running, tmp_path: Path
) -> None:
    with front_of(site, engine, tmp_path) as front:
        intake = front.auth("intake")
        handles = {a: front.handle(intake, a) for a in ("shut", "shut-redacted", "open")}
        keys = front.keys
    close_edges(tmp_path, "shut", "shut-redacted")
    with front_of(site, engine, tmp_path) as front:
        front.keys = keys
        for name in ("shut", "shut-redacted"):
            refused = front.ask(front.auth(name), ASK_SSN, handles[name])
            assert error(refused) == (403, "edge_closed")
        assert SSN in front.answer(front.auth("open"), ASK_SSN, handles["open"])
        admin = front.auth("root", role="admin")
        edge = {"tenant": "default", "source": "intake", "audience": "shut"}
        assert front.http.post("/lcguard/v1/leakage/reopen", json=edge, headers=admin).is_success
        assert SSN in front.answer(front.auth("shut"), ASK_SSN, handles["shut"])


@pytest.mark.parametrize("cascade", [False, True])
def test_a_revocation_ends_what_is_being_answered(front: Front, cascade: bool) -> None:
    intake, reader = front.auth("intake"), front.auth("open")
    handle, other = front.handle(intake, "open"), front.handle(intake, "open")
    body = {
        "model": "nano",
        "prompt": ASK_SSN,
        "max_tokens": 3000,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "lcguard": {"consume": [other, handle]},
    }
    with front.http.stream("POST", "/v1/completions", json=body, headers=reader) as answer:
        pieces = answer.iter_lines()
        assert next(pieces).startswith("data: {")
        path = f"/lcguard/v1/segments/{handle}"
        gone = front.http.delete(path, headers=intake, params={"cascade": cascade}).json()
        assert gone["ended_requests"] == 1
        lines = [line for line in pieces if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "revoked"
    assert not any("[DONE]" in line for line in lines)
    database = front.running.log.parent / "lcguard.sqlite"
    rows = audit_rows(database, "event = 'failed' AND handle = ?", handle)
    assert [r["reason"] for r in rows] == ["a segment that it read was revoked"]
    assert front.ask(reader, ASK_SSN, other).status_code == 200
