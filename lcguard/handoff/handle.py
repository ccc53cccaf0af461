"""What a publisher passes on to its audience, and the requests that make and use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lcguard.handoff.errors import HandoffError


@dataclass(frozen=True)
class Handle:
    """A published segment, to be passed on as text or JSON."""

    handle: str
    grant: str
    audience: str
    expires_at_s: int
    n_tokens: int
    guard: str = ""
    forbid: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Handle:
        """Raises ``ValueError`` for a missing field; unknown ones are left out."""
        try:
            return cls(
                handle=str(value["handle"]),
                grant=str(value["grant"]),
                audience=str(value["audience"]),
                expires_at_s=int(value["expires_at_s"]),
                n_tokens=int(value["n_tokens"]),
                guard=str(value.get("guard", "")),
                forbid=tuple(value.get("forbid", ())),
            )
        except KeyError as error:
            raise ValueError(f"handle lacks {error}: pass what publish returned") from None


def handles_of(answer: Mapping[str, Any]) -> list[Handle]:
    """Of what the engine answered a publish, one for each audience. Raises ``ValueError``."""
    return [Handle.from_dict(one) for one in (answer, *answer.get("also", ()))]


def publish_params(
    agent: str,
    audience: str | Sequence[str],
    policy: Sequence[str] | None = None,
    ttl_s: float | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """The ``publish`` part of a request; see ``lcguard.handoff.request.EnginePublish``.

    Raises ``HandoffError`` for no audience.
    """
    first, *others = [audience] if isinstance(audience, str) else list(audience) or [""]
    if not first:
        raise HandoffError(400, "audience names nobody: give at least one")
    out: dict[str, Any] = {"source": agent, "audience": first}
    if others:
        out["also"] = [{"audience": name} for name in others]
    if policy is not None:
        out["forbid"] = list(policy)
    if ttl_s is not None:
        out["ttl_s"] = float(ttl_s)
    if spans is not None:
        out["spans"] = [list(span) for span in spans]
    return out


def consume_params(agent: str, handles: Sequence[Handle]) -> dict[str, Any]:
    """The ``consume`` part of a request."""
    segments = [{"handle": h.handle, "grant": h.grant} for h in handles]
    return {"agent": agent, "segments": segments}
