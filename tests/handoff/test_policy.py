"""The policy: what it accepts, which edge wins, and that every doubt ends in 'forbidden'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lcguard.categories import CATEGORIES, DERIVABLE, DESCRIPTIONS
from lcguard.handoff.policy import (
    Edge,
    Policy,
    PolicyError,
    load_policy,
    parse_policy,
    policy_schema,
)
from lcguard.records import mask_of

GOOD = """
version: 1
edges:
  - source: intake
    audience: billing
    forbid: [health, government_id]
    derive: [health]
  - source: intake
    audience: "*"
    forbid: [contact]
"""


def load(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def policy(*edges: dict[str, object]) -> Policy:
    return parse_policy({"version": 1, "edges": list(edges)})


def test_categories_are_described() -> None:
    assert tuple(DESCRIPTIONS) == CATEGORIES
    assert set(DERIVABLE) <= set(CATEGORIES)


def test_loads(tmp_path: Path) -> None:
    edge = load(tmp_path, GOOD).for_edge("intake", "billing")
    assert edge.forbid == ("government_id", "health")  # mask order
    assert edge.derive == ("health",)
    assert (edge.guard, edge.on_failure, edge.fixed_length) == ("redact", "block", False)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("forbid: [contact]", "forbd: [contact]", "edges[1].forbd = ['contact']: unknown key; did"),
        ("forbid: [contact]", "forbid: [contacts]", "edges[1].forbid[0] = 'contacts': not a valid"),
        ("forbid: [contact]", "forbid: [contacts]", "did you mean 'contact'?"),
        ("forbid: [contact]", "guard: gate", "edges[1].forbid: missing; add `forbid: ...`"),
        ("forbid: [contact]", "forbid: contact", "edges[1].forbid = 'contact'"),
        ("forbid: [contact]", "forbid: [contact, contact]", "'contact' is listed twice"),
        ("derive: [health]", "derive: [finance]", "add it to forbid as well"),
        ("derive: [health]", "derive: [government_id]", "only health, finance have"),
        ("derive: [health]", "on_failure: pass", "edges[0].on_failure = 'pass'"),
        ("derive: [health]", "ttl_s: 0", "edges[0].ttl_s = 0"),
        ("derive: [health]", "ttl_s: .inf", "edges[0].ttl_s = inf"),
        ("derive: [health]", "fixed_length: yes", "edges[0].fixed_length = 'yes'"),
        ("derive: [health]", "forbid: []", "duplicate key 'forbid'"),
        ("version: 1", "version: 2", "version = 2"),
        ("version: 1", "", "version: missing"),
        ("version: 1", "version: 1\nedge: []", "did you mean 'edges'?"),
        ("version: 1", "version: 1\nforbid: [health]", "did you mean 'edges.forbid'?"),
        ("version: 1", "version: 1\ncategories: [health, contact]", "add it to categories"),
        ('audience: "*"', "audience: billing", "edges[0] and edges[1] are both intake -> billing"),
        ('audience: "*"', "audience: bill*", "edges[1].audience = 'bill*'"),
        (
            'audience: "*"',
            "audience: acme/billing",
            "'acme/billing': no agent and no tenant has '/'",
        ),
        ('audience: "*"', "audience: the desk", "edges[1].audience = 'the desk'"),
        ('audience: "*"', "audience: büro", "edges[1].audience = 'büro'"),
        ("version: 1", "version: [1", "not valid YAML"),
        ("version: 1", "version: 2024-01-01", "version = '2024-01-01'"),
        ("version: 1", "- 1", "not valid YAML"),
        (GOOD, "[]", "top level is a list"),
        (GOOD, "", "version: missing"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(PolicyError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    message = str(caught.value)
    assert expected in message
    assert "policy.yaml: " in message
    assert "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.yaml: cannot be read"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # \xe9")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load_policy(tmp_path / "latin.yaml")


def test_most_specific_edge_wins() -> None:
    rules = policy(
        {"source": "*", "audience": "*", "forbid": ["person"]},
        {"source": "a", "audience": "*", "forbid": ["contact"]},
        {"source": "*", "audience": "b", "forbid": ["health"]},
        {"source": "a", "audience": "b", "forbid": []},
    )
    assert rules.for_edge("a", "b").forbid == ()
    assert rules.for_edge("a", "x").forbid == ("contact",)
    assert rules.for_edge("x", "b").forbid == ("health",)
    hop = rules.for_edge("x", "y")
    assert (hop.source, hop.audience, hop.forbid) == ("x", "y", ("person",))


def test_equally_specific_edges_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"edges\[0\] and edges\[1\] both match a -> b; add an"):
        policy(
            {"source": "a", "audience": "*", "forbid": []},
            {"source": "*", "audience": "b", "forbid": ["health"]},
        )


def test_fails_closed() -> None:
    rules = policy({"source": "a", "audience": "b", "forbid": []})
    closed = rules.for_edge("b", "a")  # direction matters
    assert (closed.forbid, closed.derive) == (CATEGORIES, ())
    for name in ("", "*", "a/b/c", "/a", "acme/", "a b"):
        with pytest.raises(PolicyError, match="no agent's name"):
            rules.for_edge(name, "b")


def test_the_guard_that_nobody_named_is_redact() -> None:
    for rules in (policy(), policy({"source": "a", "audience": "b", "forbid": ["health"]})):
        assert rules.for_edge("a", "b").guard == "redact"


def test_unknown_categories_stay_forbidden() -> None:
    data = {"source": "a", "audience": "b", "forbid": ["person"]}
    rules = parse_policy({"version": 1, "categories": ["person", "health"], "edges": [data]})
    assert set(CATEGORIES) - set(rules.for_edge("a", "b").forbid) == {"health"}


def test_mask() -> None:
    edge = Edge(source="a", audience="b", forbid=("health", "finance"), derive=("finance",))
    mask = mask_of([edge.rule] * 3)
    assert mask.forbid.shape == mask.derive.shape == (3, len(CATEGORIES))
    assert mask.forbid.dtype == torch.bool
    forbidden = {c for c, hidden in zip(CATEGORIES, mask.forbid[2].tolist(), strict=True) if hidden}
    assert forbidden == {"health", "finance"}
    assert mask.derive.sum(1).tolist() == [1, 1, 1]
    assert mask.derive[0, CATEGORIES.index("finance")]


def test_schema_names_every_key() -> None:
    schema = policy_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["Edge"]["properties"]) == set(Edge.model_fields)
    json.dumps(schema)


def test_checking_a_policy_does_not_import_torch() -> None:
    code = "import sys, lcguard; lcguard.load_policy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


names = st.sampled_from(["a", "b", "c", "*"])


@st.composite
def edges(draw: st.DrawFn) -> list[dict[str, object]]:
    pairs = draw(st.lists(st.tuples(names, names), unique=True, max_size=6))
    out: list[dict[str, object]] = []
    for source, audience in pairs:
        forbid = draw(st.lists(st.sampled_from(CATEGORIES), unique=True))
        derive = [c for c in forbid if c in DERIVABLE and draw(st.booleans())]
        out.append({"source": source, "audience": audience, "forbid": forbid, "derive": derive})
    return out


@given(edges(), st.randoms())
def test_digest_and_hops_do_not_depend_on_order(rules: list[dict[str, object]], random) -> None:
    try:
        first = policy(*rules)
    except PolicyError:
        with pytest.raises(PolicyError, match="both match"):  # and in any other order
            policy(*reversed(rules))
        return
    shuffled = [
        {**edge, "forbid": random.sample(edge["forbid"], len(edge["forbid"]))} for edge in rules
    ]
    random.shuffle(shuffled)
    second = policy(*shuffled)
    assert first.digest == second.digest
    for source in "abcd":
        for audience in "abcd":
            hop = first.for_edge(source, audience)
            assert hop == second.for_edge(source, audience)
            assert set(hop.derive) <= set(hop.forbid)
            matched = [
                edge
                for edge in rules
                if edge["source"] in (source, "*") and edge["audience"] in (audience, "*")
            ]
            if not matched:
                assert hop.forbid == CATEGORIES
            else:
                assert any(set(hop.forbid) == set(edge["forbid"]) for edge in matched)


@given(edges())
def test_any_change_of_meaning_changes_the_digest(rules: list[dict[str, object]]) -> None:
    try:
        before = policy(*rules)
    except PolicyError:
        return
    for i, edge in enumerate(rules):
        changed = [*rules[:i], {**edge, "fixed_length": True}, *rules[i + 1 :]]
        assert policy(*changed).digest != before.digest


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(["version", "edges", "categories", "x"]), json_like))
def test_nonsense_is_a_policy_error(data: dict[str, object]) -> None:
    message = ""
    try:
        parse_policy(data)
    except PolicyError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@given(edges())
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, rules: list[dict]) -> None:
    try:
        before = policy(*rules)
    except PolicyError:
        return
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(yaml.safe_dump(before.model_dump(mode="json")))
    assert load_policy(path) == before


TENANTS = """
version: 1
edges:
  - {source: intake, audience: billing, forbid: [contact]}
  - {source: intake, audience: billing, tenant: acme, forbid: [health]}
  - {source: "*", audience: "*", tenant: beta, forbid: []}
"""


def test_a_tenants_own_edge_goes_before_the_others(tmp_path: Path) -> None:
    rules = load(tmp_path, TENANTS)
    assert rules.for_edge("acme/intake", "acme/billing").forbid == ("health",)
    assert rules.for_edge("other/intake", "other/billing").forbid == ("contact",)
    assert rules.for_edge("intake", "billing").forbid == ("contact",)
    # a tenant's wildcard too, and it opens nothing for anybody else
    assert rules.for_edge("beta/intake", "beta/billing").forbid == ()
    assert rules.for_edge("acme/a", "acme/b").forbid == CATEGORIES
    found = rules.for_edge("acme/intake", "acme/billing")
    assert (found.source, found.audience) == ("acme/intake", "acme/billing")


@pytest.mark.parametrize(
    ("source", "audience"), [("acme/intake", "beta/billing"), ("acme/intake", "billing")]
)
def test_no_hop_crosses_tenants(source: str, audience: str, tmp_path: Path) -> None:
    rules = load(tmp_path, TENANTS)
    with pytest.raises(PolicyError, match="from one tenant to another"):
        rules.for_edge(source, audience)


def test_the_digest_knows_tenants(tmp_path: Path) -> None:
    rules = load(tmp_path, TENANTS)
    other = load(tmp_path, TENANTS.replace("tenant: acme", "tenant: acne"))
    assert rules.digest != other.digest
    again = Policy(version=1, edges=rules.edges[::-1])
    assert rules.digest == again.digest


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("max_segments: 0", "edges[0].max_segments = 0"),
        ("window_s: 0", "edges[0].window_s = 0"),
        ("window_s: 9000000", "edges[0].window_s"),
        ("detect: all", "edges[0].detect = 'all'"),
        ("on_leak: pass", "edges[0].on_leak = 'pass'"),
        ("tenant: ''", "edges[0].tenant = ''"),
        ("tenant: acme/x", "edges[0].tenant = 'acme/x'"),
    ],
)
def test_refuses_what_the_proxy_could_not_keep(more: str, expected: str, tmp_path: Path) -> None:
    text = f"version: 1\nedges:\n  - {{source: a, audience: b, forbid: [], {more}}}\n"
    with pytest.raises(PolicyError) as caught:
        load(tmp_path, text)
    assert expected in str(caught.value)
