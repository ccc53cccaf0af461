"""A policy that was cut off in the middle of a write opens nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcguard.handoff.policy import Policy, PolicyError, load_policy
from lcguard.handoff.policy_reader import PolicyReader, is_whole, loosened
from lcguard.reloading import ReloadingFile

TEXT = """\
version: 1
edges:
  - source: intake
    audience: billing
    forbid:
      - government_id
      - health
      - person
    guard: redact
    ttl_s: 60
    max_draws: 1
  - source: intake
    audience: research
    forbid: []
    guard: identity
  - source: "*"
    audience: "*"
    tenant: acme
    forbid: [health, finance]
    derive: [health]
    on_leak: redact
"""
HOPS = [("intake", "billing"), ("intake", "research"), ("acme/a", "acme/b"), ("x", "y")]


def hidden(policy: Policy) -> list[set[str]]:
    return [set(policy.for_edge(*hop).forbid) for hop in HOPS]


@pytest.mark.parametrize("end", ["", "...\n"])
def test_no_cut_hides_less_than_the_whole(tmp_path: Path, end: str) -> None:
    """Written in place, as an editor does; the rest never comes."""
    path, text = tmp_path / "policy.yaml", TEXT + end
    path.write_text(text)
    whole, opened = load_policy(path), 0
    for n in sorted({*range(0, len(text), 7), *(i for i, c in enumerate(text) if c == "\n")}):
        path.write_text(text)
        reader = PolicyReader()
        assert reader(path) == whole
        with path.open("w") as file:
            file.write(text[:n])
        try:
            plain = load_policy(path)
        except PolicyError:
            continue
        opened += any(now < was for was, now in zip(hidden(whole), hidden(plain), strict=True))
        try:
            taken = reader(path)
        except PolicyError:
            continue
        assert all(was <= now for was, now in zip(hidden(whole), hidden(taken), strict=True))
        assert taken.for_edge(*HOPS[0]).guard == "redact"
    assert opened, "no cut parses as a policy that hides less: the test shows nothing"


def test_a_followed_policy_keeps_the_whole_one_in_force(tmp_path: Path) -> None:
    path, now_s = tmp_path / "policy.yaml", [0.0]
    path.write_text(TEXT)
    followed = ReloadingFile(path, PolicyReader(), clock=lambda: now_s[0])
    whole = followed.current()

    def after(text: str) -> Policy:
        path.write_text(text)
        now_s[0] += 2
        return followed.current()

    cut = TEXT[: TEXT.index("      - health\n")]
    assert after(cut) == whole
    assert "person, health no longer forbidden" in followed.error
    assert after(TEXT) == whole
    assert followed.error == ""
    # the same text with an end is meant
    assert after(cut + "...\n").for_edge("intake", "billing").forbid == ("government_id",)
    # what hides more needs none, and from there the way back does
    less = TEXT.replace("      - person\n", "")
    after(less + "...\n")
    assert after(TEXT) == whole
    assert after(less) == whole


def test_json_shows_its_own_end(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"version": 1, "edges": []}))
    assert is_whole(path)
    reader = PolicyReader()
    reader(path)
    edge = {"source": "a", "audience": "b", "forbid": []}
    path.write_text(json.dumps({"version": 1, "edges": [edge]}))
    assert reader(path).for_edge("a", "b").forbid == ()
    path.write_text("version: 1\nedges: []\n# ...\n")
    assert not is_whole(path)


@pytest.mark.parametrize(
    ("change", "looser"),
    [
        (("guard: redact", "guard: gate"), "guard is 'gate', it was 'redact'"),
        (("ttl_s: 60", "ttl_s: 61"), "ttl_s is 61.0, it was 60.0"),
        (("ttl_s: 60", "ttl_s: 59"), ""),
        (("    max_draws: 1\n", ""), "max_draws is 2, it was 1"),
        (("max_draws: 1", "max_draws: null"), "max_draws is None, it was 1"),
        (("      - person\n", ""), "person no longer forbidden"),
        (("    forbid: []\n    guard: identity", "    forbid: [health]"), ""),
        (("derive: [health]", "derive: [health, finance]"), "finance now passes"),
        (("    derive: [health]\n", ""), ""),
        (("on_leak: redact", "on_leak: refuse"), "on_leak is 'refuse'"),
    ],
)
def test_what_is_looser(tmp_path: Path, change: tuple[str, str], looser: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXT)
    old = load_policy(path)
    path.write_text(TEXT.replace(*change))
    assert path.read_text() != TEXT
    found = loosened(old, load_policy(path))
    assert (looser in found) if looser else found == ""
    assert loosened(old, old) == ""


def test_taking_an_open_edge_away_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXT)
    old, start = load_policy(path), TEXT.index("  - source: intake\n    audience: research")
    path.write_text(TEXT[:start] + TEXT[TEXT.index('  - source: "*"') :])
    assert loosened(old, load_policy(path)) == ""
