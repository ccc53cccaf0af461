"""What an edge carries, KV or text: the fields of an edge that are for text alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.names import ANY, EdgeName, PolicyName

Channel = Literal["kv", "text"]
KV_ALONE = (
    *("guard", "derive", "fixed_length", "max_segments", "window_s", "max_draws"),
    *("length_bucket", "on_leak"),
)
"""Fields of an edge that would say nothing of a text."""


def apart(name: Any) -> Any:
    """``acme/intake`` in one field would match nobody, and the next wider edge would decide."""
    if isinstance(name, str) and "/" in name:
        raise ValueError("no agent and no tenant has '/' in its name; give the tenant as `tenant:`")
    return name


def one(name: str) -> str:
    """A name that stands for nobody else."""
    if name == ANY:
        raise ValueError("name the agents one by one: everybody may not see what the edge hides")
    return name


AgentName = Annotated[PolicyName, BeforeValidator(apart)]


class Model(BaseModel):
    """A part of a policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ChannelFields(Model):
    """Of an edge."""

    channel: Channel = "kv"
    """What is handed over: ``kv``, guarded by ``guard``, or ``text``, in which placeholders stand
    for what the edge forbids. The other is refused."""
    restore: tuple[Annotated[AgentName, AfterValidator(one)], ...] = ()
    """For ``text``: agents that may have the placeholders' values back. Nobody by default."""

    @model_validator(mode="after")
    def _of_one_channel(self) -> ChannelFields:
        if self.restore and self.channel != "text":
            raise ValueError("restore is for channel: text; KV has no placeholders to restore")
        known = type(self).model_fields
        for name in KV_ALONE if self.channel == "text" else ():
            if name in known and getattr(self, name) != known[name].default:
                raise ValueError(f"{name} is for channel: kv; leave it out where text is handed on")
        return self


class _Edge(Protocol):
    @property
    def channel(self) -> Channel: ...
    @property
    def name(self) -> EdgeName: ...


def check_channel(edge: _Edge, channel: Channel) -> None:
    """Raises ``HandoffError`` (403) for KV over an edge for text, and the reverse."""
    if edge.channel != channel:
        said = {"kv": "KV", "text": "text"}
        use = {"kv": "publish and consume segments", "text": "send it as lcguard.text"}
        raise HandoffError(
            403,
            f"{edge.name.in_words} takes {said[edge.channel]} alone, not {said[channel]}: "
            f"{use[edge.channel]}, or let the policy say channel: {channel}",
        )
