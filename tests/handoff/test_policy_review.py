"""``lcguard policy check``: which edge decides a hop, and which edges never can."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.keys import new_key
from lcguard.commands.serve import load_settings
from lcguard.handoff.names import ANY
from lcguard.handoff.policy import PolicyError, parse_policy
from lcguard.handoff.policy_review import idle, never, why
from lcguard.reloading import ReloadingFile
from lcguard.server.lifespan import policy_of

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
    assert holds.startswith("forbid person; derive nothing; guard redact; ")
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
        i
        for i, (t, s, a) in enumerate(found)
        if t in (tenant, ANY) and s in (source, ANY) and a in (audience, ANY)
    ]
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


def test_an_edge_that_the_engine_cannot_serve_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nedges:\n"
        "  - {source: '*', audience: a, forbid: [], guard: gates}\n"
        "  - {source: '*', audience: b, forbid: [], fixed_length: true}\n"
        "  - {source: '*', audience: c, forbid: [], guard: redact}\n...\n"
    )
    for agent in "abc":
        new_key(tmp_path / "keys.yaml", agent)
    run = CliRunner().invoke
    done = run(app, ["config", "check", "--dir", str(tmp_path)])
    first, second = done.stderr.splitlines()
    assert "edges[0] (* -> a) refuses every publish: guard 'gates' is none of the" in first
    assert "edges[1] (* -> b) refuses every publish: fixed_length is not for vLLM" in second
    # neither the policy alone nor a server that attaches knows the engine's guards
    done = run(app, ["policy", "check", str(path)])
    assert done.stderr.splitlines() == [second]
    (tmp_path / "server.yaml").write_text("upstream: {url: 'http://127.0.0.1:9'}\n")
    done = run(app, ["config", "check", "--dir", str(tmp_path)])
    assert done.stderr.splitlines() == [second]


def test_a_detector_that_no_guard_is_told_of_is_named() -> None:
    hop = {"source": "intake", "audience": "billing", "forbid": ["person"], "detect": "lcguard"}
    edges = [
        hop | {"guard": "gate"},
        hop | {"guard": "twin", "audience": "clerk"},
        hop | {"guard": "gate", "audience": "desk", "on_leak": "redact"},
        hop | {"channel": "text", "audience": "mail"},
    ]
    (line,) = idle(parse_policy({"version": 1, "edges": edges}))
    assert "says detect 'lcguard' and hides nothing by it: guard 'gate' cannot be told" in line


def test_serve_warns_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nedges:\n  - {source: Intake, audience: '*', forbid: []}\n...\n"
    )
    new_key(tmp_path / "keys.yaml", "intake")
    done = CliRunner().invoke(
        app,
        [
            "serve",
            "--dir",
            str(tmp_path),
            "--upstream",
            "http://127.0.0.1:9",
            "--set",
            "store=ftp://nowhere",
        ],
    )
    assert "ftp" in str(done.exception)
    assert "edges[0] (Intake -> *) never matches" in done.stderr
    assert "did you mean 'intake'?" in done.stderr


AGREED = {
    "good": "version: 1\nedges: []\n",
    "slash": "version: 1\nedges:\n  - {source: acme/a, audience: b, forbid: []}\n",
    "unknown category": "version: 1\nedges:\n  - {source: a, audience: b, forbid: [helth]}\n",
    "ambiguous": "version: 1\nedges:\n  - {source: a, audience: '*', forbid: []}\n"
    "  - {source: '*', audience: b, forbid: []}\n",
    "aliases": "a: &a [x]\n" + "version: 1\nedges: &e [*e]\n",
    "no YAML": "version: [1",
    "not UTF-8": "version: 1 # \udce9",
    "empty": "",
}


@pytest.mark.parametrize("case", AGREED)
def test_commands_and_server_agree_on_a_policy(case: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(AGREED["good"])
    new_key(tmp_path / "keys.yaml", "a")
    running = policy_of(load_settings(tmp_path, None, [], None))  # as the server follows it
    assert isinstance(running, ReloadingFile)
    path.write_text(AGREED[case], errors="surrogateescape")
    said: set[str] = set()
    for command in (
        ["policy", "check", str(path)],
        ["config", "check", "--dir", str(tmp_path)],
        ["serve", "--dir", str(tmp_path), "--upstream", "http://127.0.0.1:9"],
    ):
        if case == "good" and command[0] == "serve":
            continue
        done = CliRunner().invoke(app, command)
        said.add("" if done.exit_code == 0 else str(done.exception))
    running._next_s = 0.0  # look now
    running.current()
    said.add(running.error)
    assert len(said) == 1, said
    assert (said == {""}) == (case == "good")
