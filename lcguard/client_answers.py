"""What the proxy answers ``lcguard.client``, beside OpenAI's own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


class _Shown(BaseModel):
    """What the proxy says; what this version does not know is kept."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Published(_Shown):
    """A segment that its publisher made."""

    handle: str
    source: str
    audience: str
    expires_at_s: float
    guard: str
    forbid: tuple[str, ...] = ()
    derive: tuple[str, ...] = ()
    n_tokens: int
    redacted_spans: int | None = None
    """Places where a named or found value was overwritten; None for other guards."""
    unproven: str = ""
    """Why nothing shows that the guard withholds anything; empty where something does."""


class Segment(_Shown):
    """A segment as its publisher, its audience or an auditor may see it."""

    handle: str
    source: str
    audience: str
    created_at_s: float
    expires_at_s: float
    n_tokens: int
    """Rounded up for the audience (``length_bucket`` of the edge)."""
    guard: str
    manifest: dict[str, Any] | None = None
    """Verified; only of a segment that was asked for by its handle."""


class Revoked(_Shown):
    revoked: tuple[str, ...]
    """The handle, and with ``cascade`` those that were published on top of it."""
    ended_requests: int
    still_in_store: tuple[str, ...] = ()


class EdgeLeakage(_Shown):
    """What canaries lost on an edge."""

    tenant: str
    source: str
    audience: str


class GuardedText(_Shown):
    """What an audience may have."""

    value: Any
    """As it was given: a text, messages or any JSON value."""
    hidden: dict[str, int]
    """How many values were hidden, by the word of their placeholders."""
    forbid: tuple[str, ...] = ()


class RestoredText(_Shown):
    """What this agent may have back."""

    value: Any
    restored: int
    """Placeholders that were replaced by their values."""
    kept: int
    """Values that stay hidden: expired, of another conversation, or not for this agent."""


def guarded_text(answer: Any, form: str) -> GuardedText:
    return GuardedText.model_validate({**answer["applied"], "value": answer[form]})


def restored_text(answer: Any, form: str) -> RestoredText:
    return RestoredText(value=answer[form], restored=answer["restored"], kept=answer["kept"])


def published_of(answer: ChatCompletion) -> Published | list[Published]:
    found: Any = (answer.model_extra or {}).get("lcguard") or {}
    if "published" not in found:
        raise ValueError(
            "the answer says nothing of a published segment: is base_url that of an LCGuard proxy?"
        )
    made = found["published"]
    if isinstance(made, list):  # audiences were given as a list
        return [Published.model_validate(one) for one in made]
    return Published.model_validate(made)


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""
