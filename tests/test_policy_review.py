"""``lcguard policy check``: which edge decides a hop, and which edges never can."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.keys import new_key
from lcguard.names import ANY
from lcguard.policy import PolicyError, parse_policy
from lcguard.policy_review import never, why

RULES = parse_policy(
    {
        "version": 1,
        "edges": [
            {"source": "*", "audience": "*", "forbid": []},
            {"source": "intake", "audience": "billing", "forbid": ["health"]},
            {"source": "intake", "audience": "*", "tenant": "acme", "forbid": ["person"]},
        ],
    }
)


def test_says_which_edge_decides_and_which_stand_back() -> None:
    first, holds, *rest = why(RULES, "acme/intake", "acme/billing")
    assert first == (
        "acme/intake -> acme/billing: edges[2] (intake -> *, tenant acme) decides, "
        "the most specific of 3 that match"
    )
    assert holds.startswith("forbid person; derive nothing; guard gate; ")
    assert rest == [
        "edges[1] (intake -> billing) matches too and stands back",
        "edges[0] (* -> *) matches too and stands back",
    ]


def test_says_that_nothing_matches() -> None:
    closed = parse_policy({"version": 1, "edges": []})
    first, holds = why(closed, "a", "b")
    assert first == "a -> b: no edge matches, so every category is forbidden"
    assert "government_id" in holds
    with pytest.raises(PolicyError, match="'a/b/c' is no agent's name"):
        why(closed, "a/b/c", "b")


names = st.sampled_from(["a", "b", "*"])
edges = st.lists(st.tuples(names, names, names), unique=True, max_size=6)


@given(edges, names, names, names)
def test_what_is_explained_is_what_is_applied(
    found: list[tuple[str, str, str]], tenant: str, source: str, audience: str
) -> None:
    data = [
        {"tenant": t, "source": s, "audience": a, "forbid": [], "ttl_s": 1.0 + i}
        for i, (t, s, a) in enumerate(found)
    ]
    try:
        rules = parse_policy({"version": 1, "edges": data})
    except PolicyError:
        return
    if ANY in (tenant, source, audience):
        return
    hop = f"{tenant}/{source}", f"{tenant}/{audience}"
    applied = rules.for_edge(*hop)
    matching = [
        i for i, (t, s, a) in enumerate(found)
        if t in (tenant, ANY) and s in (source, ANY) and a in (audience, ANY)
    ]  # fmt: skip
    assert sorted(rules.matching(*hop)) == matching
    first = why(rules, *hop)[0]
    assert f"edges[{int(applied.ttl_s - 1)}]" in first if matching else "no edge" in first


ANYONE = {"source": "*", "audience": "*", "forbid": []}
AGENTS = {("acme", "intake"), ("acme", "billing"), ("beta", "desk")}


@pytest.mark.parametrize(
    ("edge", "reason"),
    [
        ({"source": "a:b"}, "no API key can have the name 'a:b'"),
        ({"tenant": "acne"}, "no API key is of tenant 'acne'; did you mean 'acme'?"),
        ({"source": "Intake"}, "no API key is of agent 'Intake'; did you mean 'intake'?"),
        ({"source": "intake", "tenant": "beta"}, "no API key is of agent 'intake' in tenant"),
        ({"source": "desk", "audience": "billing"}, "no tenant has API keys of both"),
    ],
)
def test_an_edge_that_no_agent_can_match_is_named(edge: dict[str, str], reason: str) -> None:
    rules = parse_policy({"version": 1, "edges": [ANYONE | edge]})
    (line,) = never(rules, AGENTS)
    assert line.startswith("edges[0] (")
    assert reason in line


def test_edges_that_can_match_are_not() -> None:
    assert list(never(RULES, AGENTS)) == []
    assert list(never(RULES)) == []
    (line,) = never(RULES, {("beta", "intake"), ("beta", "billing")})
    assert "edges[2]" in line


def test_the_commands_refuse_explain_and_warn(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    text = "version: 1\nedges:\n  - {source: intake, audience: billing, forbid: [health]}\n...\n"
    run = CliRunner().invoke
    path.write_text(text)
    done = run(app, ["policy", "check", str(path), "--explain", "acme/intake", "acme/billing"])
    assert "edges[0] (intake -> billing) decides, no other matches" in done.stdout
    assert "warning" not in done.stderr
    path.write_text(text.removesuffix("...\n"))
    assert "end it with a line `...`" in run(app, ["policy", "check", str(path)]).stderr
    path.write_text(text)
    # without a key nobody is `billing`, and both commands say so
    new_key(tmp_path / "keys.yaml", "intake", tenant="acme")
    new_key(tmp_path / "keys.yaml", "billling", tenant="acme")
    warning = "never matches: no API key is of agent 'billing'; did you mean 'billling'?"
    for command in (["policy", "check", str(path)], ["config", "check", "--dir", str(tmp_path)]):
        done = run(app, command)
        assert done.exit_code == 0
        assert warning in done.stderr
    path.write_text(text.replace("source: intake", "source: acme/intake"))
    for command in (["policy", "check", str(path)], ["config", "check", "--dir", str(tmp_path)]):
        done = run(app, command)
        assert done.exit_code != 0
        assert "edges[0].source = 'acme/intake': no agent" in str(done.exception)
