"""What an edge carries: KV over a text edge is refused, and the reverse; fields of one channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lcguard.handoff.channel import check_channel
from lcguard.handoff.errors import HandoffError, LineageError
from lcguard.handoff.lineage import check_current
from lcguard.handoff.policy import Policy, PolicyError, parse_policy
from lcguard.handoff.policy_reader import loosened
from lcguard.handoff.policy_review import unserved, why
from lcguard.handoff.request import EnginePublish, edge_of
from lcguard.rule import Rule


def policy(**edge: Any) -> Policy:
    given = {"source": "intake", "audience": "billing", "forbid": ["person"]} | edge
    return parse_policy({"version": 1, "edges": [given]})


TEXT = policy(channel="text", restore=["desk"])


@dataclass
class Segment:
    """The part of a manifest that lineage reads."""

    source_agent: str = "intake"
    audience: str = "billing"
    lineage: Any = field(default_factory=lambda: Whole())


@dataclass
class Whole:
    rule: Rule = field(default_factory=lambda: Rule(("person",)))
    origins: tuple[str, ...] = ("intake",)
    raw: bool = False
    custom: dict[str, str] = field(default_factory=dict)


def test_an_edge_carries_kv_where_nothing_is_said() -> None:
    edge = policy().for_edge("intake", "billing")
    assert edge.channel == "kv"
    check_channel(edge, "kv")
    with pytest.raises(HandoffError, match=r"takes KV alone, not text.*channel: text"):
        check_channel(edge, "text")
    check_current(Segment(), policy())


def test_kv_over_a_text_edge_is_refused() -> None:
    wish = EnginePublish(source="intake", audience="billing")
    with pytest.raises(HandoffError, match="intake -> billing takes text alone, not KV") as found:
        edge_of(TEXT, wish)
    assert found.value.status == 403
    assert "\n" not in str(found.value)
    with pytest.raises(LineageError, match="takes text alone"):
        check_current(Segment(), TEXT)


@pytest.mark.parametrize(
    ("field_", "value"),
    [
        ("guard", "gate"),
        ("derive", ["person"]),
        ("fixed_length", True),
        ("max_segments", 3),
        ("max_draws", None),
        ("length_bucket", 1),
        ("on_leak", "redact"),
    ],
)
def test_fields_of_kv_say_nothing_of_text(field_: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=f"{field_} (is for channel: kv|names)"):
        policy(channel="text", **{field_: value})


def test_restore_is_of_text_and_names_agents() -> None:
    assert TEXT.for_edge("acme/intake", "acme/billing").restore == ("desk",)
    with pytest.raises(PolicyError, match="restore is for channel: text"):
        policy(restore=["desk"])
    with pytest.raises(PolicyError, match="one by one"):
        policy(channel="text", restore=["*"])
    with pytest.raises(PolicyError, match="'/'"):
        policy(channel="text", restore=["acme/desk"])
    with pytest.raises(PolicyError, match="channel"):
        policy(channel="fax")


def test_a_cut_off_file_does_not_change_what_is_carried_or_restored() -> None:
    assert "restore" in loosened(policy(channel="text"), TEXT)
    assert "channel" in loosened(policy(), policy(channel="text"))


def test_a_policy_explains_the_fields_of_the_channel() -> None:
    (line,) = [line for line in why(TEXT, "intake", "billing") if line.startswith("forbid")]
    assert "channel text; restore ('desk',)" in line
    assert "guard" not in line
    assert not list(unserved(TEXT, ["gate"])), "no engine's guard is needed"
