"""A policy's own category on the hops of a real engine: hidden in every spelling, on every hop."""

from __future__ import annotations

import unicodedata
from typing import Any

import httpx
import pytest
import torch

from lcguard.commands.live_servers import Site
from lcguard.handoff.keys import KEY_VARIABLE
from lcguard.store import open_store
from tests.engine import needs_vllm
from tests.server.proxy import ASK_COMPLAINT, COMPLAINT, POLICY, Front, error
from tests.server.proxy_client import audit_rows

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

OWN = POLICY["categories"]["project_name"]
SPELLED = {
    "as written": lambda t: t,
    "upper case": lambda t: t.upper(),
    "across a line break": lambda t: t.replace(" ", "\n").replace("-", "-\n"),
    "non-breaking": lambda t: t.replace(" ", "\u00a0").replace("-", "\u2011"),
    "NFD": lambda t: unicodedata.normalize("NFD", t),
    "zero width": lambda t: t[0] + "\u200b" + t[1:],
}
PAIRS = (("Zoë Unit 4711", "Zoë Unit 4712"), ("PRJ-2041", "PRJ-2042"))
"""Values of as many tokens each: what is left of two notes is the same where both are hidden."""
ASK_NAME = "What is the patient's name?"


def labs(front: Front, name: str) -> dict[str, str]:
    return front.auth(name, "labs")


def note(value: str) -> str:
    return f"The patient's name is {value}. Chief complaint: {COMPLAINT}."


def published(front: Front, audience: str, text: str, **more: Any) -> dict[str, Any]:
    answer = front.publish(labs(front, "lead"), audience, text, **more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["lcguard"]["published"])


def on_top(front: Front, who: str, audience: str, *consumed: str) -> httpx.Response:
    return front.chat(
        labs(front, who),
        "",
        {"consume": list(consumed), "publish": {"audience": audience}},
        max_tokens=1,
        messages=[{"role": "system", "content": "Desk: 4."}],
        add_generation_prompt=False,
    )


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize("pair", PAIRS, ids=["term", "pattern"])
def test_what_is_handed_over_does_not_depend_on_the_value(
    front: Front, site: Site, spelling: str, pair: tuple[str, str]
) -> None:
    store, key = open_store(site.store), bytes.fromhex(site.environment[KEY_VARIABLE])

    def apart(audience: str) -> float:
        made = [published(front, audience, note(SPELLED[spelling](v))) for v in pair]
        if audience == "team":
            assert [m["redacted_spans"] for m in made] == [1, 1]
            assert made[0]["forbid"] == ["project_name"]
        one, other = (store.load(m["handle"], key) for m in made)
        assert one.keys.shape == other.keys.shape
        return float(torch.cat((one.keys - other.keys, one.values - other.values)).abs().max())

    assert apart("team") < 1e-4
    assert apart("peer") > 1e-2


def test_all_of_them_at_once(front: Front) -> None:
    values = [SPELLED[s](t) for t, s in zip(OWN["terms"], 2 * [*SPELLED], strict=False)]
    text = note(f"{values[2]}") + f" Seen by {', '.join([*values[:2], *values[3:], 'prj-2041'])}."
    assert published(front, "team", text)["redacted_spans"] == 11
    # a text completion and a prompt of tokens are the same
    lead, publish = labs(front, "lead"), {"publish": {"audience": "team"}}
    got = front.complete(lead, text, max_tokens=1, lcguard=publish)
    assert got.json()["lcguard"]["published"]["redacted_spans"] == 11


def test_the_audience_reads_the_rest(front: Front) -> None:
    handle = published(front, "team", note("Blue Heron"))["handle"]
    assert "Heron" not in front.answer(labs(front, "team"), ASK_NAME, handle)
    assert COMPLAINT in front.answer(labs(front, "team"), ASK_COMPLAINT, handle)
    database = front.site.folder / "lcguard.sqlite"
    (row,) = audit_rows(database, "event = 'publish' AND handle = ?", handle)
    assert row["reason"] == "own categories looked for: project_name"


def test_it_travels_with_what_was_consumed(front: Front) -> None:
    told = published(front, "peer", note("Blue Heron"))["handle"]
    refused = on_top(front, "peer", "team", told)
    assert error(refused) == (403, "policy")
    assert "project_name" in refused.json()["error"]["message"]
    passed = on_top(front, "peer", "partner", told)
    assert passed.status_code == 200, passed.text
    handle = passed.json()["lcguard"]["published"]["handle"]
    database = front.site.folder / "lcguard.sqlite"
    (row,) = audit_rows(database, "event = 'declassified' AND handle = ?", handle)
    assert "project_name" in row["reason"]


def test_a_request_asks_for_it_where_the_guard_can_find_it(front: Front) -> None:
    lead = labs(front, "lead")
    learnt = front.publish(lead, "press", forbid=["project_name"])
    assert error(learnt) == (400, "policy")
    assert "cannot find project_name" in learnt.json()["error"]["message"]
    unknown = front.publish(lead, "team", forbid=["projectname"])
    assert unknown.status_code == 400
    assert "'projectname': use person" in unknown.json()["error"]["message"]


def test_the_policy_shows_the_name_and_no_term(front: Front) -> None:
    for who in (labs(front, "team"), front.auth("root", "labs", "admin")):
        got = front.http.get("/lcguard/v1/policy", headers=who)
        assert "Heron" not in got.text
        (own,) = {str(c) for c in got.json()["categories"].values()}
        assert own == "{'project_name': {'terms': 10, 'patterns': 1}}"
