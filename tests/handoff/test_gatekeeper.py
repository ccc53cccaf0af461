"""Grants, requests and the gatekeeper: what may happen on a hop, and how it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcguard.handoff.errors import GrantError, HandoffError
from lcguard.handoff.gatekeeper import SCAN_S, Gatekeeper
from lcguard.handoff.grants import check_grant, make_grant, new_handle
from lcguard.handoff.handle import Handle
from lcguard.handoff.plan import ModelFacts
from lcguard.handoff.policy import parse_policy
from lcguard.handoff.redaction import covered
from lcguard.handoff.request import EnginePublish, edge_of, parse_handoff, tokens_digest
from lcguard.server.authorization.approved_handoff import GRANT_S, signed_order
from lcguard.store import open_store
from lcguard.vllm.frontend import FrontEnd

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
FACTS = ModelFacts(
    "m", "r" * 64, "c" * 64, {"kind": "default"}, placeholder_id=0, neutral_id=3, max_model_len=256
)


# -- grants


def test_a_grant_covers_one_handle_one_audience_and_its_time() -> None:
    handle = new_handle()
    grant = make_grant(KEY, handle, "billing", 1000)
    check_grant(KEY, handle, "billing", grant, 999.9)
    for change in (
        {"key": OTHER},
        {"handle": new_handle()},
        {"audience": "mallory"},
        {"now_s": 1000.0},
        {"grant": "2000" + grant[4:]},
        {"grant": grant.upper()},
        {"grant": "0" + grant},
        {"grant": ""},
    ):
        use = {
            "key": KEY,
            "handle": handle,
            "audience": "billing",
            "grant": grant,
            "now_s": 0.0,
        } | change
        with pytest.raises(GrantError) as caught:
            check_grant(**use)  # type: ignore[arg-type]
        assert grant[5:] not in str(caught.value)


def test_handles_are_long_and_never_the_same() -> None:
    made = {new_handle() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(h) == 32 for h in made)


# -- requests


def handoff(**value: Any) -> Any:
    return parse_handoff({"lcguard": value})


PUBLISH = {"source": "a", "audience": "b"}
GRANT = {"handle": "h" * 20, "grant": "1.x"}


def test_requests_without_the_parameter_are_ordinary() -> None:
    assert parse_handoff(None) is None
    assert parse_handoff({"other": 1}) is None


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ("text", "str"),
        ({}, "give publish or consume"),
        ({"publish": {"source": "a"}}, "publish.audience"),
        ({"publish": PUBLISH | {"raw": True}}, "publish.raw"),
        ({"publish": PUBLISH | {"audience": "*"}}, "publish.audience"),
        ({"publish": PUBLISH | {"audience": "a b"}}, "publish.audience"),
        ({"publish": PUBLISH | {"audience": "acme/desk/b"}}, "publish.audience"),
        ({"publish": PUBLISH | {"audience": "acme/"}}, "publish.audience"),
        ({"publish": PUBLISH | {"forbid": ["Age"]}}, "publish.forbid"),
        ({"publish": PUBLISH | {"ttl_s": 0}}, "publish.ttl_s"),
        ({"publish": PUBLISH | {"ttl_s": float("nan")}}, "publish.ttl_s"),
        ({"publish": PUBLISH | {"spans": [[1]]}}, "publish.spans"),
        ({"consume": {"agent": "b", "segments": []}}, "consume.segments"),
        ({"consume": {"agent": "b", "segments": [GRANT | {"handle": "../../etc"}]}}, "handle"),
        ({"consume": {"agent": "b", "segments": [GRANT | {"grant": "x" * 500}]}}, "grant"),
        ({"consume": {"agent": "b", "segments": [GRANT], "placed": "yes"}}, "placed"),
    ],
)
def test_malformed_requests_name_the_key(value: Any, where: str) -> None:
    with pytest.raises(HandoffError, match=where) as caught:
        parse_handoff({"lcguard": value})
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


# -- gatekeeper


def keeper(**changes: Any) -> Gatekeeper:
    edges = [
        {
            "source": "a",
            "audience": "b",
            "forbid": ["health", "person"],
            "derive": ["health"],
            "guard": "gate",
            "ttl_s": 60.0,
        },
        {"source": "a", "audience": "c", "forbid": [], "guard": "redact"},
        {"source": "a", "audience": "d", "forbid": [], "guard": "gate", "fixed_length": True},
    ]
    policy = parse_policy({"version": 1, "edges": edges})
    return Gatekeeper(
        replace(FACTS, **changes),
        policy,
        ["gate", "redact"],
        open_store("memory://"),
        KEY,
        clock=lambda: 1000.0,
    )


def test_a_request_tightens_the_policy_and_never_loosens_it() -> None:
    plan = keeper().plan(handoff(publish=PUBLISH), [1, 2]).publish
    assert plan is not None
    assert (plan.rule.forbid, plan.rule.derive) == (("person", "health"), ("health",))
    assert plan.copies[0].expires_at_s == 1060
    request = PUBLISH | {"forbid": ["finance", "health"], "ttl_s": 5.0}
    tight = keeper().plan(handoff(publish=request), [1, 2]).publish
    assert tight is not None
    assert (tight.rule.forbid, tight.rule.derive) == (("person", "health", "finance"), ())
    assert tight.copies[0].expires_at_s == 1005
    assert tight.copies[0].policy_digest != plan.copies[0].policy_digest
    longer = keeper().edge(EnginePublish(source="a", audience="b", forbid=(), ttl_s=9e5))
    assert (longer.forbid, longer.ttl_s) == (("person", "health"), 60.0)


def test_behind_a_proxy_only_what_it_signed_is_planned() -> None:
    """Neither a publish nor a consume that somebody else wrote, changed or kept for later."""
    mine = keeper()
    mine.proxy_only = True
    wish = {"publish": PUBLISH | {"ttl_s": 5}}
    signed = signed_order(KEY, wish, 1000.0)
    assert mine.plan(handoff(**signed), [1, 2]).publish is not None
    late = signed_order(KEY, wish, 1000.0 - GRANT_S)
    for bad in (
        wish,
        {"consume": {"agent": "b", "segments": [GRANT]}},
        late,
        signed_order(OTHER, wish, 1000.0),
        signed | {"publish": PUBLISH | {"audience": "c"}},
        signed | {"consume": {"agent": "b", "segments": [GRANT]}},
        signed | {"order": "1.2"},
    ):
        with pytest.raises(HandoffError, match="the proxy") as caught:
            mine.plan(handoff(**bad), [1, 2])
        assert caught.value.status == 403
    assert keeper().plan(handoff(**wish), [1, 2]).publish is not None


def test_what_a_guard_looked_through_is_signed_for_one_prompt_and_one_policy() -> None:
    edges = [
        {"source": "a", "audience": name, "forbid": forbid, "guard": "finder"}
        for name, forbid in (("b", ["person"]), ("c", ["health"]))
    ]
    mine = Gatekeeper(
        FACTS,
        parse_policy({"version": 1, "edges": edges}),
        ["finder"],
        open_store("memory://"),
        KEY,
        clock=lambda: 1000.0,
        finders=["finder"],
    )
    ids = list(range(10, 20))
    plan = mine.plan(handoff(publish=PUBLISH), ids).publish
    assert plan is not None
    assert plan.scan
    said = mine.scanned(plan, ids, [(2, 4)])
    left = covered(ids, [(2, 4)], FACTS.neutral_id)
    done = mine.plan(handoff(publish=PUBLISH | said), left).publish
    assert done is not None
    assert not done.scan
    for wish, prompt, match in (
        (said, ids, "still holds"),
        (said, [*left[:-1], 99], "not of this prompt"),
        (said | {"audience": "c"}, left, "under this policy"),
        (said | {"forbid": ["finance"]}, left, "under this policy"),
        (said | {"scan": "9" * 20}, left, "not of this prompt"),
        ({"spans": [[2, 4]]}, left, "leave spans out"),
    ):
        with pytest.raises(HandoffError, match=match):
            mine.plan(handoff(publish=PUBLISH | wish), prompt)
    mine.clock = lambda: 1000.0 + SCAN_S
    with pytest.raises(HandoffError, match="expired"):
        mine.plan(handoff(publish=PUBLISH | said), left)
    # the proxy signs what its client asked for, not what the engine adds
    asked, added = handoff(publish=PUBLISH), handoff(publish=PUBLISH | said)
    assert asked.text() == added.text()
    assert asked.text() != handoff(publish=PUBLISH | {"spans": [[2, 4]]}).text()


def test_an_edge_that_nobody_wrote_forbids_everything() -> None:
    publish = {"source": "x", "audience": "y", "spans": ()}
    plan = keeper().plan(handoff(publish=publish), [1]).publish
    assert plan is not None
    assert len(plan.rule.forbid) == 7


@pytest.mark.parametrize("edges", [[], [{"source": "x", "audience": "y", "forbid": []}]])
def test_without_a_word_on_the_guard_it_is_redact_and_nothing_named_is_refused(edges: Any) -> None:
    policy, store = parse_policy({"version": 1, "edges": edges}), open_store("memory://")
    mine = Gatekeeper(FACTS, policy, ["gate", "redact"], store, KEY)
    publish = {"source": "x", "audience": "y"}
    with pytest.raises(HandoffError, match=r"x -> y .* name secrets.*\[\] for none.*another guard"):
        mine.plan(handoff(publish=publish), [1])
    plan = mine.plan(handoff(publish=publish | {"spans": ()}), [1]).publish
    assert plan is not None
    assert plan.guard == "redact"


def test_handles_are_new_for_every_request_and_contents_are_not() -> None:
    plans = [keeper().plan(handoff(publish=PUBLISH), [77123]).publish for _ in range(2)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].handle != plans[1].handle
    assert plans[0].content == plans[1].content
    # neither the text nor what its noise comes from
    assert "77123" not in repr(plans[0])
    assert repr(plans[0].content.context) not in repr(plans[0])


def test_redact_refuses_a_span_that_still_holds_its_secret() -> None:
    def plan(prompt: list[int], spans: Any = ((1, 3),)) -> Any:
        request = {"source": "a", "audience": "c"} | ({"spans": spans} if spans is not None else {})
        return keeper().plan(handoff(publish=request), prompt)

    assert plan([9, 3, 3, 9]).publish.guard == "redact"
    assert plan([9], spans=()).publish.guard == "redact"
    for prompt, spans, message in (
        ([9, 3, 8, 9], ((1, 3),), "still holds its secret"),
        ([9, 3, 3, 9], None, "name secrets, or spans"),
        ([9, 3], ((1, 3),), "not within"),
        ([9, 3, 3], ((-1, 2),), "not within"),
    ):
        with pytest.raises(HandoffError, match=message):
            plan(prompt, spans)


class Plain:
    """Sampling parameters that ask for nothing, where vLLM is not installed."""

    __struct_fields__ = ("temperature", "stop", "n")
    temperature, stop, n = 1.0, (), 1


def test_spans_of_another_prompt_are_refused() -> None:
    def admit(counted_on: list[int], prompt: list[int]) -> Any:
        publish = {
            "source": "a",
            "audience": "c",
            "spans": ((1, 3),),
            "tokens": tokens_digest(counted_on),
        }
        front = FrontEnd(keeper())
        return front.admit(
            handoff(publish=publish), {"type": "token", "prompt_token_ids": prompt}, Plain()
        )["prompt_token_ids"]

    assert admit([9, 8, 7, 6], [9, 8, 7, 6]) == [9, 3, 3, 6]
    for other in ([9, 8, 7], [9, 8, 7, 6, 5], [1, 9, 8, 7, 6], [98, 7, 6], [9, 8, 76]):
        with pytest.raises(HandoffError, match="other tokens"):
            admit([9, 8, 7, 6], other)


@pytest.mark.parametrize(
    ("request_", "prompt", "options", "message"),
    [
        ({"publish": PUBLISH}, None, {}, "embeddings"),
        ({"publish": PUBLISH}, [1], {"samples": 2}, "n=2"),
        ({"publish": PUBLISH}, [], {}, "no tokens of its own"),
        ({"publish": PUBLISH | {"audience": "d"}}, [1], {}, "fixed_length"),
        ({"publish": PUBLISH | {"spans": []}}, [1], {}, "leave them out"),
    ],
)
def test_plans_that_are_refused(request_: Any, prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(HandoffError, match=message):
        keeper().plan(handoff(**request_), prompt, **options)


def test_a_handle_travels_as_json() -> None:
    made = Handle("h" * 32, "1.ab", "b", 5, 9, "gate", ("health",))
    assert Handle.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="grant"):
        Handle.from_dict({"handle": "x"})


# -- what a proxy may ask for in a publish


def rules(**edge: Any) -> Any:
    both = {"source": "a", "audience": "b", "forbid": ["health"], "guard": "gate"} | edge
    return parse_policy({"version": 1, "edges": [both]})


def test_a_request_chooses_redact_only_where_the_policy_lets_it() -> None:
    wish = EnginePublish(source="a", audience="b", guard="redact")
    with pytest.raises(HandoffError, match="on_leak: redact") as caught:
        edge_of(rules(), wish)
    assert caught.value.status == 400
    assert edge_of(rules(on_leak="redact"), wish).guard == "redact"
    assert edge_of(rules(guard="redact"), wish).guard == "redact"
    plain = EnginePublish(source="a", audience="b")
    assert edge_of(rules(on_leak="redact"), plain).guard == "gate"


def test_a_publish_never_crosses_tenants() -> None:
    with pytest.raises(HandoffError, match="one tenant to another"):
        edge_of(rules(), EnginePublish(source="acme/a", audience="beta/b"))


def test_a_chosen_handle_is_long_and_used(tmp_path: Path) -> None:
    keeper = Gatekeeper(
        FACTS, rules(guard="identity"), ["identity"], open_store(str(tmp_path)), KEY
    )
    handle = new_handle()
    handoff = parse_handoff(
        {"lcguard": {"publish": {"source": "a", "audience": "b", "handle": handle}}}
    )
    assert handoff is not None
    plan = keeper.plan(handoff, [1, 2, 3])
    assert plan.publish is not None
    assert plan.publish.handle == handle
    with pytest.raises(HandoffError, match=r"publish\.handle"):
        parse_handoff({"lcguard": {"publish": {"source": "a", "audience": "b", "handle": "short"}}})
