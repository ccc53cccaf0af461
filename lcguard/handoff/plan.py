"""What a request may do once it was checked: the engine carries it out and asks nothing more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lcguard.handoff.content import Content
from lcguard.manifest import Manifest
from lcguard.rule import Rule


@dataclass(frozen=True)
class ModelFacts:
    """What a segment must agree with, and the tokens that stand in for others."""

    model_id: str
    revision: str
    """Digest of the weights."""
    config_digest: str
    rope: dict[str, Any]
    placeholder_id: int
    neutral_id: int
    max_model_len: int
    """Tokens that a prompt and its answer may have together."""


@dataclass(frozen=True)
class PlannedCopy:
    """One audience's segment of a publish: a handle, a manifest and bytes of its own."""

    handle: str
    audience: str
    policy_digest: str
    """Of the edge as if it were the only one: its audience is shown it."""
    expires_at_s: int


@dataclass(frozen=True)
class PublishPlan:
    """Everything the worker needs to guard and store a prompt's KV."""

    copies: tuple[PlannedCopy, ...]
    """All of them are stored, or none."""
    source: str
    guard: str
    rule: Rule
    """Of all edges, and of what was consumed."""
    origins: tuple[str, ...]
    """Agents whose text the segment stands on."""
    hop: int
    start_token: int
    """First prompt token of the segment: what was consumed is not published again."""
    content: Content = field(repr=False)
    """The text: its noise is drawn from it, and it stands in no log."""
    scan_rule: str = ""
    """Digest of the rule that a guard looks for secrets under."""
    scan: bool = False
    """True for a prompt that the guard still has to look for secrets in: nothing is stored, and the
    answer says what was found."""
    told: tuple[tuple[int, int], ...] = ()
    """What is hidden in the prompt before the guard looks at it."""
    custom: dict[str, str] = field(default_factory=dict)
    """Of the rule's own categories, the definitions that were looked for in the prompt."""

    @property
    def handle(self) -> str:
        """The first copy's, which names the publish inside the engine."""
        return self.copies[0].handle

    @property
    def audiences(self) -> str:
        """For a log."""
        return ", ".join(copy.audience for copy in self.copies)


@dataclass(frozen=True)
class Plan:
    """A handoff that may happen."""

    consume: tuple[Manifest, ...] = ()
    agent: str = ""
    publish: PublishPlan | None = None
    shown_tokens: int = 0
    """Of what is consumed, as far as its audience may know."""
    room_tokens: int = 0
    """Most that may be generated."""

    @property
    def n_consumed(self) -> int:
        """Placeholder tokens at the start of the prompt."""
        return sum(m.n_tokens for m in self.consume)
