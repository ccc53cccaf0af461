"""Categories that a policy defines itself: every doubt is an error at load or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lcguard.cli import app
from lcguard.commands.keys import new_key
from lcguard.commands.policy import warnings
from lcguard.handoff.errors import HandoffError, LineageError
from lcguard.handoff.gatekeeper import Gatekeeper
from lcguard.handoff.lineage import check_current, check_guard, on_top
from lcguard.handoff.policy import Policy, PolicyError, check_finders, load_policy, parse_policy
from lcguard.handoff.policy_reader import PolicyReader
from lcguard.handoff.policy_review import why
from lcguard.handoff.request import EnginePublish, check_findable, edge_of, parse_handoff
from lcguard.manifest import Lineage
from lcguard.records import mask_of
from lcguard.server.authorization.rule_digest import rule_digest
from lcguard.store import open_store
from lcguard.strict_yaml import dump_yaml
from tests.handoff.test_gatekeeper import FACTS, KEY
from tests.handoff.test_lineage import Segment

OWN = {"terms": ["Blue Heron", "Grey Fox"], "patterns": [r"PRJ-\d{4}"]}
GOOD = """
version: 1
categories:
  project_name: {terms: [Blue Heron], patterns: ['PRJ-\\d{4}']}
tenants:
  acme:
    categories:
      project_name: {terms: [Red Kite]}
      deal: {terms: [Long March]}
edges:
  - {source: a, audience: b, forbid: [health, project_name]}
  - {source: a, audience: c, tenant: acme, forbid: [deal], guard: twin}
"""


def edge(source: str = "a", audience: str = "b", **more: Any) -> dict[str, Any]:
    return {"source": source, "audience": audience, "forbid": ["project_name"]} | more


def policy(*edges: dict[str, Any], **own: Any) -> Policy:
    return parse_policy(
        {"version": 1, "categories": {"project_name": OWN | own}, "edges": list(edges or [edge()])}
    )


def saved(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return path


def refused(*command: str) -> str:
    """What a command says that fails."""
    done = CliRunner().invoke(app, list(command))
    assert isinstance(done.exception, PolicyError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


# -- at load


def test_a_tenant_adds_to_what_holds_for_all(tmp_path: Path) -> None:
    found = load_policy(saved(tmp_path, GOOD))
    both = found.for_edge("acme/a", "acme/b").custom["project_name"]
    assert both.terms == ("Blue Heron", "Red Kite")
    assert both.patterns == (r"PRJ-\d{4}",)
    assert found.for_edge("a", "b").custom["project_name"].terms == ("Blue Heron",)
    assert found.for_edge("a", "b").forbid == ("health", "project_name")
    # where no edge matches, all that the tenant has is forbidden
    assert found.for_edge("acme/x", "acme/y").forbid[7:] == ("deal", "project_name")
    assert found.for_edge("beta/x", "beta/y").forbid[7:] == ("project_name",)
    assert parse_policy(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("'PRJ-\\d{4}'", "'PRJ-('", r"categories.project_name.patterns[0]: 'PRJ-(' is no regular"),
        ("'PRJ-\\d{4}'", "'\\d*'", "matches the empty text"),
        ("terms: [Blue Heron]", "terms: ['']", "categories.project_name.terms[0]: '' is nothing"),
        ("terms: [Blue Heron]", 'terms: ["\\u200b"]', "terms[0]: '\\u200b' is nothing but"),
        ("terms: [Blue Heron]", "tems: [Blue Heron]", "tems: unknown key; did you mean 'terms'?"),
        ("terms: [Blue Heron]", "examples: x.jsonl", "x.jsonl cannot be read: No such file"),
        ("terms: [Long March]", "", "tenants.acme.categories.deal: nobody can find it: give terms"),
        ("  project_name: {terms: [Blue", "  health: {terms: [Blue", "'health' is a built-in"),
        ("  project_name: {terms: [Blue", "  Project: {terms: [Blue", "categories.Project.[key]"),
        ("[health, project_name]", "[projct_name]", "edges[0].forbid[0] = 'projct_name': not a"),
        ("[health, project_name]", "[deal]", "tenants.acme has it for its own edges"),
        ("forbid: [deal]", "forbid: [], declassify: [dael]", "did you mean 'deal'?"),
        ("guard: twin", "guard: gate", "edges[1].guard = 'gate': guard 'gate' knows the built-in"),
        ("guard: twin", "guard: identity", "cannot find deal: use redact, or twin"),
        ("  acme:\n", "  '*':\n", "what holds for every tenant stands under categories"),
    ],
)
@pytest.mark.parametrize("command", [("policy", "check"), ("config", "check")])
def test_a_mistake_is_one_line_with_file_and_fix(
    old: str,
    new: str,
    expected: str,
    command: tuple[str, str],
    tmp_path: Path,
) -> None:
    assert old in GOOD
    path = saved(tmp_path, GOOD.replace(old, new))
    new_key(tmp_path / "keys.yaml", "a")
    given = [str(path)] if command[0] == "policy" else ["--dir", str(tmp_path)]
    said = refused(*command, *given)
    assert expected in said
    assert "policy.yaml: " in said
    if "Blue Heron" not in new:
        assert "Heron" not in said


def test_a_misplaced_definition_shows_no_term() -> None:
    own = {"project_name": OWN}
    for data in (
        {"version": 1, "categoris": own, "edges": []},
        {"version": 1, "edges": [edge(categories=own)]},
        {"categories": own, "version": 1, "edges": [edge(), edge()]},
        {"version": 1, "categories": {"project_name": OWN | {"terms": "Blue Heron"}}, "edges": []},
        {"version": 1, "categories": {"project_name": ["Blue Heron"]}, "edges": []},
    ):
        with pytest.raises(PolicyError) as caught:
            parse_policy(data)
        assert "Heron" not in str(caught.value)


def test_a_guard_called_twin_has_to_be_one(tmp_path: Path) -> None:
    found = load_policy(saved(tmp_path, GOOD))
    check_finders(found, ["redact", "twin"])
    with pytest.raises(PolicyError, match=r"p\.yaml: edges\[1\]\.guard = 'twin'"):
        check_finders(found, ["redact"], "p.yaml")
    with pytest.raises(PolicyError, match="looks for secrets"):
        PolicyReader(["redact"])(tmp_path / "policy.yaml")  # at the start, and at every reload
    assert PolicyReader(["redact", "twin"])(tmp_path / "policy.yaml") == found


def test_the_server_looks_at_its_guards(tmp_path: Path) -> None:
    saved(tmp_path, GOOD)
    new_key(tmp_path / "keys.yaml", "a")
    (tmp_path / "server.yaml").write_text("engine: {guards: {twin: 'nano:gate'}}\n")
    assert "edges[1].guard = 'twin'" in refused("config", "check", "--dir", str(tmp_path))


# -- what is shown


def test_no_digest_that_is_shown_tells_a_term() -> None:
    """Whoever knows the rest of a policy would try terms until one has the digest."""
    one, other = policy(), policy(terms=["Blue Heron", "Grey Wolf"])
    assert one.digest == other.digest
    assert one.for_edge("a", "b").digest == other.for_edge("a", "b").digest
    assert one.definitions != other.definitions
    # but the ledger's does: what was published before has to be published again
    assert rule_digest(one.for_edge("a", "b")) != rule_digest(other.for_edge("a", "b"))
    assert one.digest != policy(terms=["Blue Heron"]).digest


def test_explain_says_how_it_is_found() -> None:
    said = "\n".join(why(policy(), "a", "b"))
    assert "forbid project_name" in said
    assert "project_name: 2 terms and 1 pattern" in said
    assert "Heron" not in said


def test_a_category_that_no_edge_names_is_warned_of(tmp_path: Path) -> None:
    found = policy(edge(forbid=["health"]))
    (line,) = warnings(found, tmp_path / "none.yaml")
    assert "categories.project_name is forbidden on no edge" in line
    assert warnings(policy(), tmp_path / "none.yaml") == []


def test_terms_are_not_lost_to_a_cut_file(tmp_path: Path) -> None:
    data = policy().model_dump(mode="json")
    path, reader = saved(tmp_path, dump_yaml(data)), PolicyReader()
    reader(path)
    data["categories"]["project_name"]["terms"].pop()
    path.write_text(dump_yaml(data))
    with pytest.raises(PolicyError, match="project_name has lost terms or patterns"):
        reader(path)
    path.write_text(dump_yaml(data) + "...\n")
    reader(path)


# -- in the engine


def keeper(found: Policy) -> Gatekeeper:
    guards = ["gate", "redact", "twin", "identity"]
    return Gatekeeper(
        FACTS,
        found,
        guards,
        open_store("memory://"),
        KEY,
        clock=lambda: 1000.0,
        finders=["twin"],
        policy_guards=["gate", "twin"],
    )


def planned(mine: Gatekeeper, ids: list[int], **publish: Any) -> Any:
    wish = parse_handoff({"lcguard": {"publish": {"source": "a", "audience": "b"} | publish}})
    assert wish is not None
    return mine.plan(wish, ids).publish


def test_the_engine_takes_no_prompt_that_nobody_looked_through() -> None:
    found = policy()
    mine, now = keeper(found), found.for_edge("a", "b").definitions
    other = policy(terms=["Red Kite"]).for_edge("a", "b").definitions
    for looked_for in (None, {}, other):
        with pytest.raises(HandoffError, match="nobody looked in this prompt for project_name"):
            planned(mine, [1, 2], spans=[], looked_for=looked_for)
    plan = planned(mine, [1, 2], spans=[], looked_for=now)
    assert plan.custom == now
    with pytest.raises(ValueError, match="no guard learnt the category 'project_name'"):
        mask_of([plan.rule])
    assert not mask_of([plan.rule.without(plan.custom)]).forbid.any()


def test_a_finding_guard_is_told_what_it_cannot_find() -> None:
    found = policy(edge(guard="twin", forbid=["health", "project_name"]))
    mine, now = keeper(found), found.for_edge("a", "b").definitions
    ids, x = list(range(10, 20)), FACTS.neutral_id
    with pytest.raises(HandoffError, match="nobody looked"):
        planned(mine, ids, looked_for=now)
    with pytest.raises(HandoffError, match="still holds"):
        planned(mine, ids, looked_for=now, told=[[6, 8]])
    first = [*ids[:6], x, x, *ids[8:]]
    plan = planned(mine, first, looked_for=now, told=[[6, 8]])
    assert plan.scan
    said = mine.scanned(plan, first, [(2, 4)])
    assert said["spans"] == [[2, 4], [6, 8]]
    second = [*first[:2], x, x, *first[4:]]
    done = planned(mine, second, looked_for=now, told=[[6, 8]], **said)
    assert (done.scan, done.custom) == (False, now)
    with pytest.raises(HandoffError, match="leave it out"):
        planned(keeper(policy()), first, spans=[], looked_for=now, told=[[6, 8]])


def test_a_request_names_what_there_is() -> None:
    found = policy(edge(forbid=[]), edge(audience="c", forbid=[], guard="gate"))
    wish = EnginePublish(source="a", audience="b", forbid=("project_name",))
    assert edge_of(found, wish).custom.keys() == {"project_name"}
    with pytest.raises(HandoffError, match="cannot find project_name"):
        edge_of(found, wish.model_copy(update={"audience": "c"}))
    with pytest.raises(HandoffError, match=r"publish\.forbid: 'age': use person"):
        edge_of(found, wish.model_copy(update={"forbid": ("age",)}))


# -- what travels


def segment(found: Policy, source: str, audience: str, **more: Any) -> Segment:
    made = found.for_edge(source, audience)
    lineage = Lineage(forbid=made.forbid, origins=(source,), custom=made.definitions)
    return Segment(source, audience, lineage.model_copy(update=more))


@pytest.mark.parametrize("guard", ["redact", "twin"])
def test_nobody_hears_from_b_what_a_may_not_say(guard: str) -> None:
    own = edge("b", "c", forbid=[], guard=guard)
    found = policy(edge("a", "b", forbid=[]), own, edge("a", "c"))
    told = segment(found, "a", "b")
    top = on_top(found.for_edge("b", "c"), found, [told])
    assert top.forbid == ("project_name",)
    assert top.custom.keys() == {"project_name"}
    with pytest.raises(LineageError, match="was not guarded against project_name"):
        check_guard(top, found.for_edge("b", "c"), [told], True)
    free = policy(edge("a", "b", forbid=[]), own | {"declassify": ["project_name"]}, edge("a", "c"))
    assert on_top(free.for_edge("b", "c"), free, [told]).forbid == ()


def test_what_was_hidden_then_is_not_what_is_hidden_now() -> None:
    edges = edge("a", "b"), edge("b", "c"), edge("a", "c")
    then, now = policy(*edges), policy(*edges, terms=["Blue Heron", "Red Kite"])
    told = segment(then, "a", "b")
    check_current(told, then)
    check_guard(on_top(then.for_edge("b", "c"), then, [told]), then.for_edge("b", "c"), [told])
    with pytest.raises(LineageError, match="was not guarded against project_name"):
        check_current(told, now)
    with pytest.raises(LineageError, match="was not guarded against project_name"):
        check_guard(on_top(now.for_edge("b", "c"), now, [told]), now.for_edge("b", "c"), [told])


def test_a_category_that_is_gone_is_found_by_nobody() -> None:
    gone = parse_policy({"version": 1, "edges": [edge("b", "c", forbid=[])]})
    told = segment(policy(), "a", "b")
    top = on_top(gone.for_edge("b", "c"), gone, [told])
    assert top.forbid[-1] == "project_name"
    with pytest.raises(LineageError):
        check_guard(top, gone.for_edge("b", "c"), [told])
    with pytest.raises(HandoffError, match="no category of the policy"):
        check_findable(top)


def test_a_manifest_without_own_categories_is_as_before() -> None:
    plain = Lineage(forbid=("health",), origins=("a",))
    assert "custom" not in plain.model_dump(mode="json")
    own = Lineage(forbid=("project_name",), origins=("a",), custom={"project_name": "0" * 64})
    assert own.model_dump(mode="json")["custom"] == {"project_name": "0" * 64}
