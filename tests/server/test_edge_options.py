"""Every option of an edge shows its effect."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from lcguard.agents.scenarios.schema import amount_band
from lcguard.commands.live_servers import Site
from lcguard.handoff.policy import Edge
from lcguard.store import open_store
from tests.engine import needs_vllm
from tests.server.option_cases import error_of
from tests.server.proxy import (
    ASK_COMPLAINT,
    ASK_SSN,
    COMPLAINT,
    NAME,
    NOTE,
    POLICY,
    SSN,
    Front,
    error,
    rewrite,
    wait_for,
)

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


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
    # of each band several: equal content is published as it was before, with one noise
    salaries = (180000, 95000, 52000, 171000, 61000, 120000, 45000, 230000)
    right = {}
    for audience in ("banded", "hidden"):
        who, right[audience] = front.auth(audience), 0
        for salary in salaries:
            note = f"Employee record. The name is Quella Brandt. Current salary: {salary}."
            handle = front.handle(front.auth("intake"), audience, f"{note} Job title: Analyst.")
            said = front.answer(who, "What is the salary band?", handle)
            right[audience] += str(amount_band(str(salary))) in said
            assert str(salary) not in front.answer(who, "What is the salary?", handle)
    assert right["banded"] >= 6
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


def test_detect_looks_beside_a_guard_that_finds_secrets_itself(front: Front) -> None:
    """This one's own detector finds nothing."""
    pytest.importorskip("presidio_analyzer")
    intake = front.auth("intake")
    for audience, n, seen in (("missed", None, True), ("looked-twice", 1, False)):
        made = front.publish(intake, audience).json()["lcguard"]["published"]
        assert (made["guard"], made.get("redacted_spans")) == ("twin", n)
        who = front.auth(audience)
        assert (SSN in front.answer(who, ASK_SSN, made["handle"])) == seen
        assert COMPLAINT in front.answer(who, ASK_COMPLAINT, made["handle"])


def test_detect_lcguard_reads_the_name_too(front: Front) -> None:
    """No pattern tells a name; SmolLM2 reads it for an engine that serves another model."""
    intake, who = front.auth("intake"), front.auth("read")
    unsaid = front.publish(intake, "read")
    assert error(unsaid) == (400, "spans")  # it vouches for nothing
    assert "person, government_id" in unsaid.json()["error"]["message"]
    made = front.publish(intake, "read", secrets=[]).json()["lcguard"]["published"]
    assert made["guard"] == "redact"
    assert made["redacted_spans"] >= 2
    assert SSN not in front.answer(who, ASK_SSN, made["handle"])
    assert NAME not in front.answer(who, "What is the patient's name?", made["handle"])
    assert COMPLAINT in front.answer(who, ASK_COMPLAINT, made["handle"])


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
