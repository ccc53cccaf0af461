"""Restrictions travel with what was consumed, over every hop and every change of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.categories import CATEGORIES, DERIVABLE
from lcguard.handoff.errors import LineageError
from lcguard.handoff.lineage import (
    check_current,
    check_guard,
    declassified,
    on_top,
    origins,
)
from lcguard.handoff.policy import Policy, PolicyError, parse_policy
from lcguard.manifest import Lineage
from lcguard.rule import Rule

ALL = CATEGORIES


def policy(*edges: tuple[str, str, Any], **more: Any) -> Policy:
    made = []
    for source, audience, rule in edges:
        rule = rule if isinstance(rule, dict) else {"forbid": rule}
        rule = {k: list(v) if isinstance(v, tuple) else v for k, v in rule.items()}
        made.append({"source": source, "audience": audience, "guard": "identity"} | rule)
    return parse_policy({"version": 1, "edges": made})


@dataclass(frozen=True)
class Segment:
    """The part of a manifest that lineage reads."""

    source_agent: str
    audience: str
    lineage: Lineage | None


def published(
    rules: Policy, source: str, audience: str, *consumed: Any, raw: bool = False
) -> Segment:
    """As the engine makes it, without a look at whether the guard can."""
    edge = on_top(rules.for_edge(source, audience), rules, consumed)
    lineage = Lineage(
        forbid=edge.forbid, derive=edge.derive, origins=origins(source, consumed), raw=raw
    )
    return Segment(source, audience, lineage)


# -- joining rules

RULES = st.lists(
    st.sets(st.sampled_from(CATEGORIES)).flatmap(
        lambda f: st.tuples(st.just(tuple(f)), st.sets(st.sampled_from([*f, "health"])).map(tuple))
    ),
    max_size=4,
)


@given(RULES)
def test_a_joined_rule_is_as_strict_as_each(rules: Any) -> None:
    rules = [Rule(f, tuple(c for c in d if c in f)) for f, d in rules]
    joined = Rule.joined(rules)
    forbid, derive = joined.forbid, joined.derive
    assert set(forbid) == {c for r in rules for c in r.forbid}
    for r in rules:
        assert not (set(r.forbid) - set(r.derive)) & set(derive)  # exactly by one: exactly
    for c in set(forbid) - set(derive):
        # and nothing stricter than that
        assert any(c in r.forbid and c not in r.derive for r in rules)
    assert Rule.joined([*rules, joined]) == joined


def test_nobody_hears_from_bob_what_alice_forbids() -> None:
    """Alice may tell Bob, and Bob Carol, but Alice may not tell Carol."""
    rules = policy(("alice", "bob", ()), ("bob", "carol", ()), ("alice", "carol", ALL))
    note = published(rules, "alice", "bob")
    own = rules.for_edge("bob", "carol")
    edge = on_top(own, rules, [note])
    assert (own.forbid, edge.forbid) == ((), ALL)
    with pytest.raises(LineageError, match=r"guard 'identity' on bob -> carol.*declassify"):
        check_guard(edge, own, [note], reads_policy=False)
    with pytest.raises(LineageError, match="does not hide"):
        check_guard(edge, own, [note], reads_policy=None)
    gate = edge.model_copy(update={"guard": "gate"})
    check_guard(gate, own, [note], reads_policy=True)
    with pytest.raises(LineageError, match="does not hide"):
        check_guard(gate.model_copy(update={"guard": "blur"}), own, [note], reads_policy=False)
    assert on_top(own, rules, []).forbid == ()  # what is Bob's alone is Bob's to tell


def test_the_rule_of_what_was_consumed_goes_on_with_it() -> None:
    open_ = policy(
        ("a", "b", {"forbid": ("health", "person"), "derive": ("health",)}),
        ("b", "c", ("finance",)),
        ("a", "c", ()),
        ("c", "d", ()),
        ("a", "d", ()),
        ("b", "d", ()),
    )
    first = published(open_, "a", "b")
    second = published(open_, "b", "c", first)
    third = published(open_, "c", "d", second)
    for segment in (second, third):
        assert segment.lineage is not None
        assert segment.lineage.forbid == ("person", "health", "finance")
        assert segment.lineage.derive == ("health",)
    assert third.lineage is not None
    assert third.lineage.origins == ("a", "b", "c")


def test_it_goes_over_hops_that_say_nothing_of_it() -> None:
    rules = policy(
        ("a", "b", ()),
        ("b", "c", ()),
        ("a", "c", ()),
        ("c", "d", ()),
        ("b", "d", ()),
        ("a", "d", ("health",)),
    )
    last = published(rules, "b", "c", published(rules, "a", "b"))
    assert on_top(rules.for_edge("c", "d"), rules, [last]).forbid == ("health",)
    unnamed = policy(("a", "b", ()), ("b", "c", ()))
    note = published(unnamed, "a", "b")
    assert on_top(unnamed.for_edge("b", "c"), unnamed, [note]).forbid == ALL


def test_what_came_from_somebody_goes_back_to_them() -> None:
    rules = policy(
        ("a", "b", ("health",)), ("b", "a", ()), ("c", "b", ("finance",)), ("c", "a", ("person",))
    )
    mine = published(rules, "a", "b")
    edge = rules.for_edge("b", "a")
    assert on_top(edge, rules, [mine]).forbid == ()
    both = [mine, published(rules, "c", "b")]
    assert on_top(edge, rules, both).forbid == ("person", "finance")


def test_without_a_lineage_nothing_stands_on_it() -> None:
    rules = policy(("a", "b", ()), ("b", "c", ()), ("a", "c", ()))
    old = Segment("a", "b", None)
    with pytest.raises(LineageError, match="does not say what it stands on"):
        on_top(rules.for_edge("b", "c"), rules, [old])
    check_current(old, rules)  # its audience may hear all there is
    with pytest.raises(LineageError, match="health"):
        check_current(old, policy(("a", "b", ("health",))))


# -- guards that are exact


@pytest.mark.parametrize(
    ("consumed", "holds"),
    [
        (("health", "person"), True),
        (("health",), True),
        (("person",), False),
        ((), False),
        ({"forbid": ("health",), "derive": ("health",)}, False),
    ],
)
@pytest.mark.parametrize("guard", ["redact", "twin"])
def test_an_exact_guard_stands_only_on_what_forbade_as_much(
    guard: str, consumed: Any, holds: bool
) -> None:
    """It hides the prompt's own spans, and their neighbours have read what was consumed."""
    rules = policy(
        ("a", "b", consumed), ("b", "c", {"forbid": ("health",), "guard": guard}), ("a", "c", ())
    )
    own, known = rules.for_edge("b", "c"), {"redact": (None, None), "twin": (True, True)}[guard]
    for raw in (False, True):
        note = published(rules, "a", "b", raw=raw)
        edge = on_top(own, rules, [note])
        if holds and not raw:
            check_guard(edge, own, [note], *known)
            continue
        with pytest.raises(LineageError, match=r"segment of a was not guarded against .*health"):
            check_guard(edge, own, [note], *known)


# -- declassify


def test_declassify_lifts_what_travels_and_says_so() -> None:
    rules = policy(
        ("a", "b", ("health",)),
        ("a", "c", ("finance", "person")),
        ("b", "c", {"forbid": ("account",), "declassify": ("health", "finance", "contact")}),
    )
    note = published(rules, "a", "b")
    own = rules.for_edge("b", "c")
    assert on_top(own, rules, [note]).forbid == ("person", "account")
    assert declassified(own, rules, [note]) == ("health", "finance")
    assert declassified(own, rules, []) == ()
    with pytest.raises(PolicyError, match="declassify names 'health'"):
        policy(("a", "b", {"forbid": ("health",), "declassify": ("health",)}))
    with pytest.raises(LineageError):
        on_top(own, rules, [Segment("a", "b", None)])


# -- after the policy changed

BEFORE = (("a", "b", ()), ("b", "c", {"forbid": (), "declassify": ("contact",)}), ("a", "c", ()))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ((), True),
        ((("b", "c", ("person",)),), False),
        ((("a", "c", ("health",)),), False),  # of the origin alone, two hops before
        ((("a", "c", ("contact",)),), True),  # declassified on the edge
        ((("a", "c", ("contact",)), ("b", "c", ())), False),  # which is taken back
        ((("a", "b", ("health",)),), True),  # what b heard is heard: its own segments are refused
    ],
)
def test_a_segment_made_before_the_policy_forbade_more_is_refused(
    change: Any, allowed: bool
) -> None:
    before = policy(*BEFORE)
    note = published(before, "a", "b")
    made = published(before, "b", "c", note)
    after = policy(*{e[:2]: e for e in (*BEFORE, *change)}.values())
    check_current(made, before)
    if allowed:
        check_current(made, after)
        return
    with pytest.raises(LineageError, match="the policy now forbids c"):
        check_current(made, after)


def test_a_policy_that_became_looser_loosens_no_segment() -> None:
    before = policy(("a", "b", ("health",)), ("b", "c", ()), ("a", "c", ()))
    note = published(before, "a", "b")
    after = policy(("a", "b", ()), ("b", "c", ()), ("a", "c", ()))
    check_current(note, after)
    assert on_top(after.for_edge("b", "c"), after, [note]).forbid == ("health",)


def test_a_value_that_may_no_longer_be_derived_is_forbidden_more() -> None:
    wide = {"forbid": DERIVABLE, "derive": DERIVABLE}
    note = published(policy(("a", "b", wide)), "a", "b")
    check_current(note, policy(("a", "b", wide)))
    with pytest.raises(LineageError, match="health"):
        check_current(note, policy(("a", "b", {"forbid": DERIVABLE, "derive": ("finance",)})))
