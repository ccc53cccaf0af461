"""What the scheduler tells the workers to do in a step, and what they say came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lcguard.handoff.plan import PublishPlan


@dataclass
class SegmentRef:
    """A segment as the scheduler verified it; the worker loads this one or none."""

    handle: str
    hmac: str
    """Of its manifest."""
    n_tokens: int


@dataclass
class LoadJob:
    """Fill the first tokens of a request from segments."""

    request_id: str
    blocks: list[int]
    segments: tuple[SegmentRef, ...]
    skip: int
    """Tokens that are there already: a prefix-cache hit of the same segments."""
    n_tokens: int
    prefix: str = ""
    """Scan whose kept tokens stand behind the segments (``scanned_prefixes``)."""
    failure: str = ""
    """Why the scheduler refused: the worker then fails the load, so that nothing is computed on
    placeholders."""


@dataclass
class SaveJob:
    """Guard and store a request's prompt."""

    request_id: str
    blocks: list[int]
    n_tokens: int
    """Prompt tokens, those consumed included."""
    plan: PublishPlan


@dataclass
class StepJobs(KVConnectorMetadata):
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    """Scans of which nothing is kept any more."""
    idle: bool = False
    """Nothing is computed: all wait for the store."""


@dataclass
class SaveResults(KVConnectorWorkerMetadata):
    """Publications that came to an end: handle to why nothing was stored, empty where it was."""

    reasons: dict[str, str]
    found: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Of those whose guard only looked for secrets: the token ranges that it hides."""
    kept: dict[str, int] = field(default_factory=dict)
    """Of the same, how many tokens before the first range are kept."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, SaveResults)
        return SaveResults(
            self.reasons | other.reasons, self.found | other.found, self.kept | other.kept
        )
