"""Several audiences of one publish: their rules as one, and nothing of one shown to another."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from lcguard.handoff.audiences import hops_of
from lcguard.handoff.content import chain_of
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.plan import ModelFacts, PublishPlan
from lcguard.handoff.policy import parse_policy
from lcguard.handoff.request import EnginePublish, parse_handoff
from lcguard.store import open_store

KEY = bytes(range(32))
FACTS = ModelFacts("m", "r", "c", {"kind": "none"}, 0, 1, 512)


def _edge(audience: str, forbid: list[str], **more: Any) -> dict[str, Any]:
    return {"source": "a", "audience": audience, "forbid": forbid, "guard": "gate"} | more


POLICY = parse_policy(
    {
        "version": 1,
        "edges": [
            _edge("bands", ["health", "person"], derive=["health"], ttl_s=60.0),
            _edge("more", ["health", "finance"], derive=["health", "finance"], ttl_s=90.0),
            _edge("values", ["health"]),
            _edge("open", []),
            _edge("redacted", [], guard="redact"),
            _edge("read", [], guard="redact", detect="presidio"),
            {"source": "a", "audience": "texts", "forbid": [], "channel": "text"},
            _edge("padded", [], fixed_length=True),
            _edge("looked", ["person"], guard="twin"),
            _edge("looked-less", [], guard="twin"),
        ],
    }
)


def keeper() -> Gatekeeper:
    return Gatekeeper(
        FACTS,
        POLICY,
        ["gate", "redact", "twin"],
        open_store("memory://"),
        KEY,
        clock=lambda: 1000.0,
        finders=["twin"],
    )


def asked(*names: str, **more: Any) -> Any:
    first, *others = names
    also = [{"audience": name} for name in others]
    return {"source": "a", "audience": first, "also": also} | more


def planned(*names: str, prompt: tuple[int, ...] = (5, 6), **more: Any) -> PublishPlan:
    handoff = parse_handoff({"lcguard": {"publish": asked(*names, **more)}})
    assert handoff is not None
    plan = keeper().plan(handoff, prompt).publish
    assert plan is not None
    return plan


def test_the_rule_is_as_strict_as_every_edge() -> None:
    plan = planned("bands", "more")
    assert plan.rule.forbid == ("person", "health", "finance")
    assert plan.rule.derive == ("health", "finance")
    # who may have no band of health takes it from the others, and no more than that
    assert planned("bands", "more", "values").rule.derive == ("finance",)
    for names in permutations(["bands", "more", "values", "open"]):
        rule = planned(*names).rule
        assert rule == planned("bands", "more", "values").rule
        assert not any(rule.missing(planned(name).rule) for name in names)


def test_each_gets_a_handle_and_its_own_edges_life_and_digest() -> None:
    plan = planned("bands", "more")
    assert len({copy.handle for copy in plan.copies}) == 2
    assert [copy.audience for copy in plan.copies] == ["bands", "more"]
    assert [copy.expires_at_s for copy in plan.copies] == [1060, 1090]
    for copy in plan.copies:  # what it is shown is what it would be shown alone
        assert copy.policy_digest == planned(copy.audience).copies[0].policy_digest


def test_a_draw_belongs_to_the_set_of_its_audiences() -> None:
    def draw(*names: str, **more: Any) -> bytes:
        return chain_of(planned(*names, **more).content, "guard")[-1]

    both = draw("values", "open")
    assert both == draw("open", "values")
    assert len({both, draw("values"), draw("open"), draw("values", "open", "bands")}) == 4
    assert both != draw("values", "open", forbid=["person"])
    assert both != draw("values", "open", prompt=(5, 7))


@pytest.mark.parametrize(
    ("names", "status", "why"),
    [
        (
            ("open", "redacted"),
            400,
            "a -> open has guard 'gate' and a -> redacted has 'redact'.*apart",
        ),
        (("redacted", "read"), 400, "a -> redacted has detect 'none' and a -> read has 'presidio'"),
        (("open", "texts"), 403, "a -> texts takes text.*lcguard.text.*leave this audience out"),
        (("texts",), 403, "a -> texts takes text alone"),
        (("open", "padded"), 400, "fixed_length"),
        (("open", "acme/open"), 400, "one tenant to another"),
        (("open", "values", "open"), 400, "also names 'open' again"),
        (("open", *(f"n{i}" for i in range(16))), 400, "publish.also"),
    ],
)
def test_where_one_refuses_nobody_gets_anything(
    names: tuple[str, ...], status: int, why: str
) -> None:
    with pytest.raises(HandoffError, match=why) as caught:
        planned(*names)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_one_handle_is_not_given_to_two() -> None:
    publish = asked("open", "values", handle="h" * 32)
    publish["also"][0]["handle"] = "h" * 32
    with pytest.raises(HandoffError, match="again"):
        parse_handoff({"lcguard": {"publish": publish}})


def test_a_look_for_one_audience_is_none_for_two() -> None:
    """The engine's word on a prompt holds for the rules under which it looked."""
    own, gate = [5, 6, 7], keeper()
    for looked, published in (
        (("looked-less",), ("looked-less", "looked")),
        (("looked-less", "looked"), ("looked-less",)),
    ):
        scanned = gate.scanned(planned(*looked), own, [])
        with pytest.raises(HandoffError, match="scan is not of this prompt"):
            planned(*published, prompt=tuple(own), **scanned)
        assert not planned(*looked, prompt=tuple(own), **scanned).scan


def test_the_publisher_is_told_of_each() -> None:
    plan = planned("bands", "more")
    answer = keeper().answer_planned(plan, 9)
    told = [answer, *answer["also"]]
    assert [one["audience"] for one in told] == ["bands", "more"]
    assert [one["handle"] for one in told] == [copy.handle for copy in plan.copies]
    assert {tuple(one["forbid"]) for one in told} == {plan.rule.forbid}
    assert "also" not in keeper().answer_planned(planned("bands"), 9)


def test_one_audience_goes_by_its_edge_alone() -> None:
    wish = EnginePublish(source="a", audience="bands")
    (hop,) = hops_of(POLICY, wish)
    assert hop.own == hop.alone == hop.joint == POLICY.for_edge("a", "bands")
    assert planned("bands").scan_rule == hop.own.digest
