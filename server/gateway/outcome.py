"""Where an answer says what was applied: a field of its own, the message, and headers.

OpenAI's clients build a stream's final message from its ``delta``s, so that is where it stands too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.server.authorization.approved_handoff import ApprovedHandoff
from lcguard.server.gateway.handoff_field import FIELD


def with_outcome(answer: dict[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A whole answer, or the last chunk of a stream with a choice in it, with what was applied: for
    chats in each choice's message as well."""
    choices = [
        {**choice, name: {**choice[name], FIELD: outcome}}
        if (name := "delta" if "delta" in choice else "message") in choice
        else choice
        for choice in answer.get("choices", ())
    ]
    return {**answer, "choices": choices, FIELD: outcome}


def outcome_headers(outcome: Mapping[str, Any]) -> dict[str, str]:
    """What was applied, as headers."""
    out = {"x-lcguard-verdict": "allowed"}
    if made := outcome.get("published"):
        out |= {
            "x-lcguard-handle": made["handle"],
            "x-lcguard-expires": str(made["expires_at_s"]),
            "x-lcguard-guard": made["guard"],
            "x-lcguard-policy": made["policy_digest"],
        }
        if made.get("unproven"):
            out["x-lcguard-unproven"] = made["guard"]
    if got := outcome.get("consumed"):
        out["x-lcguard-consumed"] = ",".join(s["handle"] for s in got)
    return out


def stream_headers(approved: ApprovedHandoff) -> dict[str, str]:
    """The headers of a stream, which go out before anything is stored: its handle is good once the
    stream has ended without an error."""
    out = {"x-lcguard-verdict": "allowed"}
    if approved.edge is not None:
        out["x-lcguard-handle"] = approved.handle
    if approved.consumed:
        out["x-lcguard-consumed"] = ",".join(m.handle for m in approved.consumed)
    return out
