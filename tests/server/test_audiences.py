"""One publish for several audiences, before a real proxy and engine: each gets its own, or nobody
gets anything."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from lcguard.commands.live_servers import Site
from lcguard.store import open_store
from tests.engine import needs_vllm
from tests.server.proxy import ALL, ASK_COMPLAINT, ASK_SSN, COMPLAINT, NAME, NOTE, SSN, Front, error
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def made_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["lcguard"]["published"])


def rows(front: Front, handle: str) -> list[dict[str, Any]]:
    return audit_rows(front.site.folder / "lcguard.sqlite", "handle = ?", handle)


def refusals(front: Front, request_id: str) -> list[dict[str, Any]]:
    return audit_rows(front.site.folder / "lcguard.sqlite", "request_id = ?", request_id)


def held(site: Site) -> list[str]:
    """Handles in the store that engine and proxies share."""
    return sorted(open_store(site.store).handles())


def test_each_gets_its_own_handle_and_nothing_of_the_others(front: Front, site: Site) -> None:
    intake, open_, clerk = (front.auth(name) for name in ("intake", "open", "clerk"))
    answer = front.publish(intake, ["open", "clerk"])
    first, second = made_of(answer)
    assert [m["audience"] for m in (first, second)] == ["open", "clerk"]
    handles = [m["handle"] for m in (first, second)]
    assert set(handles) <= set(held(site))
    assert answer.headers["x-lcguard-handle"] == ",".join(handles)
    assert answer.json()["choices"][0]["message"]["lcguard"]["published"] == [first, second]
    assert handles[0] not in answer.json()["id"]  # an id would be one audience's alone
    for who, mine, others in ((open_, first, second), (clerk, second, first)):
        assert COMPLAINT in front.answer(who, ASK_COMPLAINT, mine["handle"])
        assert error(front.ask(who, ASK_COMPLAINT, others["handle"])) == (403, "not_audience")
        seen = front.http.get(f"/lcguard/v1/segments/{mine['handle']}", headers=who).json()
        assert seen["manifest"]["audience"] == mine["audience"]
        for word in (others["handle"], others["audience"]):
            assert word not in json.dumps(seen)
        hidden = front.http.get(f"/lcguard/v1/segments/{others['handle']}", headers=who)
        assert error(hidden) == (404, "no_segment")
        listed = front.http.get("/lcguard/v1/segments", headers=who).json()["data"]
        assert mine["handle"] in {s["handle"] for s in listed}
        assert others["handle"] not in {s["handle"] for s in listed}
    for made in (first, second):  # a row of each step for each of them
        found = rows(front, made["handle"])
        assert [r["event"] for r in found][:2] == ["publish", "published"]
        assert {r["audience"] for r in found if r["event"] != "refused"} == {made["audience"]}
        assert found[0]["reason"] == "one publish for open, clerk"
    # one is revoked, the other stands
    gone = front.http.delete(f"/lcguard/v1/segments/{handles[0]}", headers=intake)
    assert gone.json()["revoked"] == [handles[0]]
    assert error(front.ask(open_, ASK_COMPLAINT, handles[0])) == (404, "no_segment")
    assert COMPLAINT in front.answer(clerk, ASK_COMPLAINT, handles[1])


def test_the_strictest_of_the_edges_holds_for_all(front: Front) -> None:
    banded, measured = made_of(front.publish(front.auth("intake"), ["banded", "measured"]))
    assert banded["forbid"] == measured["forbid"] == ALL
    assert banded["derive"] == measured["derive"] == []  # `measured` may have no band
    alone = front.publish(front.auth("intake"), "banded").json()["lcguard"]["published"]
    assert alone["derive"] == ["health", "finance"]
    # and each is shown the digest of its own edge
    assert banded["policy_digest"] == alone["policy_digest"] != measured["policy_digest"]
    for name, made in (("banded", banded), ("measured", measured)):
        assert SSN not in front.answer(front.auth(name), ASK_SSN, made["handle"])


@pytest.mark.parametrize("form", ["header", "stream", "responses", "one"])
def test_every_way_of_asking(front: Front, form: str) -> None:
    who, names = front.auth("intake"), ["open", "clerk"]
    if form == "header":
        answer = front.chat(who | {"x-lcguard-publish": "open, clerk"}, NOTE, max_tokens=1)
        made = made_of(answer)
    elif form == "stream":
        text = front.chat(who, NOTE, {"publish": {"audience": names}}, stream=True).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        (made,) = [e["lcguard"]["published"] for e in events if "lcguard" in e]
        assert "kv_transfer_params" not in text
    elif form == "responses":
        body = {"model": "nano", "input": NOTE, "max_output_tokens": 1}
        told = body | {"lcguard": {"publish": {"audience": names}}}
        answer = front.http.post("/v1/responses", json=told, headers=who)
        made = made_of(answer)
        assert made[0]["handle"] not in answer.json()["id"]
    else:  # a list is answered by a list
        names = ["open"]
        made = made_of(front.publish(who, names))
    assert [m["audience"] for m in made] == names
    for name, one in zip(names, made, strict=True):
        assert COMPLAINT in front.answer(front.auth(name), ASK_COMPLAINT, one["handle"])


@pytest.mark.parametrize(
    ("tenant", "agent", "names", "status", "code", "why"),
    [
        ("default", "intake", ["open", "hidden"], 400, "policy", "intake has guard|apart"),
        ("default", "intake", ["named", "screened"], 400, "policy", "detect"),
        ("scribes", "desk", ["hidden", "clerk"], 403, "policy", "lcguard.text"),
        ("default", "intake", ["open", "padded"], 400, "", "fixed_length"),
        ("default", "intake", ["open", "open"], 400, "bad_handoff", "twice"),
        ("default", "intake", [], 400, "bad_handoff", "lcguard.publish.audience: "),
        ("default", "intake", 5, 400, "bad_handoff", "lcguard.publish.audience: "),
        ("default", "intake", ["open", 5], 400, "bad_handoff", "lcguard.publish.audience.1: "),
        ("default", "intake", [f"n{i}" for i in range(17)], 400, "bad_handoff", "16"),
    ],
)
def test_a_publish_that_one_edge_refuses_is_refused_to_all(
    front: Front, site: Site, tenant: str, agent: str, names: Any, status: int, code: str, why: str
) -> None:
    before = held(site)
    answer = front.publish(front.auth(agent, tenant), names)
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]
    assert any(part in said["message"] for part in why.split("|"))
    assert not code or said["code"] == code
    assert held(site) == before
    if code == "policy":
        found = refusals(front, answer.headers["x-request-id"])
        assert [(r["event"], r["audience"]) for r in found] == [("refused", n) for n in names]


def test_an_edge_that_canaries_closed_closes_the_publish(tight: Front, site: Site) -> None:
    who, before = tight.auth("intake"), held(site)
    assert error(tight.publish(who, ["open", "shut"])) == (403, "edge_closed")
    # `redact` takes the guard's place on a closed edge that says so, and is no guard of the others
    answer = tight.publish(who, ["open", "shut-redacted"], secrets=[])
    assert error(answer) == (400, "policy")
    assert "apart" in answer.json()["error"]["message"]
    assert held(site) == before
    one = tight.handle(who, "open")
    assert one in held(site)


def test_a_draw_for_two_and_one_for_either_are_two(front: Front) -> None:
    """Two draws of one record are what an audience may have (max_draws)."""
    note = NOTE.replace(NAME, "Nils Aukland")
    intake, hidden, measured = (front.auth(name) for name in ("intake", "hidden", "measured"))
    both = made_of(front.publish(intake, ["hidden", "measured"], note, record="nils"))
    again = made_of(front.publish(intake, ["measured", "hidden"], note, record="nils"))
    alone = front.handle(intake, "hidden", note, record="nils")
    third = made_of(front.publish(intake, ["hidden", "banded"], note, record="nils"))
    for handle in (both[0]["handle"], again[1]["handle"], alone):  # the same set, the same draw
        assert front.ask(hidden, ASK_COMPLAINT, handle).status_code == 200
    refused = front.ask(hidden, ASK_COMPLAINT, third[0]["handle"])
    assert error(refused) == (403, "budget")
    # the others' accounts are their own
    assert front.ask(measured, ASK_COMPLAINT, both[1]["handle"]).status_code == 200
    assert front.ask(front.auth("banded"), ASK_COMPLAINT, third[1]["handle"]).status_code == 200


def test_what_was_consumed_restricts_every_audience(front: Front, site: Site) -> None:
    alice, bob, erin = (front.auth(name, "kin") for name in ("alice", "bob", "erin"))
    told = front.handle(alice, "bob")
    before = held(site)

    def on_top(audience: Any) -> httpx.Response:
        handoff = {"publish": {"audience": audience}, "consume": [told]}
        return front.chat(bob, "Seen today.", handoff, max_tokens=1)

    # bob may tell erin what alice told him, and not carol: then neither hears it in one breath
    refused = on_top(["erin", "carol"])
    assert error(refused) == (403, "policy")
    assert "what was consumed forbids" in refused.json()["error"]["message"]
    assert held(site) == before
    (made,) = made_of(on_top(["erin"]))
    found = rows(front, made["handle"])
    assert [r["event"] for r in found] == ["publish", "declassified", "published"]
    assert front.ask(erin, ASK_COMPLAINT, made["handle"]).status_code == 200


def test_redact_hides_what_is_named_from_all_and_over_two_hops(front: Front) -> None:
    """Where nobody wrote an edge, and what stands on the segment goes with it."""
    intake, billing, desk = (front.auth(n, "unwritten") for n in ("intake", "billing", "desk"))
    named = {"secrets": [NAME, SSN]}
    first, second = made_of(front.publish(intake, ["billing", "desk"], NOTE, **named))
    assert first["redacted_spans"] == second["redacted_spans"] == 2
    handoff = {
        "publish": {"audience": ["archive", "desk"], "secrets": []},
        "consume": [first["handle"]],
    }
    built = made_of(front.chat(billing, "Seen today.", handoff, max_tokens=1))
    assert SSN not in front.answer(desk, ASK_SSN, second["handle"])
    url = f"/lcguard/v1/segments/{first['handle']}"
    gone = front.http.delete(url, params={"cascade": "true"}, headers=intake).json()["revoked"]
    assert set(gone) == {first["handle"], *(m["handle"] for m in built)}
    assert COMPLAINT in front.answer(desk, ASK_COMPLAINT, second["handle"])
