"""Where an answer says what was applied: a field of its own, the message, and headers.

OpenAI's clients build a stream's final message from its ``delta``s, so that is where it stands too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcguard.server.authorization.settlement import Settlement
from lcguard.server.gateway.contract_answer import clean, clean_event, clean_response
from lcguard.server.gateway.exchange import Exchange
from lcguard.server.gateway.handoff_field import FIELD


async def applied(x: Exchange, settlement: Settlement) -> dict[str, Any]:
    """What an answered handoff came to, for the client; the audit has it then.

    Raises ``ProxyError`` (502, 503) where it did not come about.
    """
    out: dict[str, Any] = {}
    with x.tracing.step("settle", x):
        if x.text is not None:
            out["text"] = await x.text.finish()
        if x.approved is not None:
            out |= await settlement.finish(x.approved)
    return out


def cleaned(x: Exchange, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What of vLLM's answer, or of a piece of it, may go to the client of a handoff."""
    approved = x.approved
    reads = bool(approved and approved.consumed) or bool(x.text and x.text.guards_answer)
    unsaid_tokens = approved.unsaid_tokens if approved else 0
    if not x.responds:
        return clean(answer, reads, unsaid_tokens)
    made = clean_event if "type" in answer else clean_response
    return made(answer, reads, unsaid_tokens)


def with_outcome(answer: dict[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A whole answer, or the last chunk of a stream with a choice in it, with what was applied: for
    chats in each choice's message as well."""
    if "choices" not in answer:
        return {**answer, FIELD: outcome}
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
    if found := outcome.get("published"):
        made = found if isinstance(found, list) else [found]  # of several audiences, in order
        out |= {
            "x-lcguard-handle": ",".join(m["handle"] for m in made),
            "x-lcguard-expires": ",".join(str(m["expires_at_s"]) for m in made),
            "x-lcguard-guard": made[0]["guard"],
            "x-lcguard-policy": ",".join(m["policy_digest"] for m in made),
        }
        if made[0].get("unproven"):
            out["x-lcguard-unproven"] = made[0]["guard"]
    if got := outcome.get("consumed"):
        out["x-lcguard-consumed"] = ",".join(s["handle"] for s in got)
    return out


def stream_headers(x: Exchange) -> dict[str, str]:
    """The headers of a stream, which go out before anything is stored: its handle is good once the
    stream has ended without an error."""
    approved = x.approved
    if approved is None:
        return {"x-lcguard-verdict": "allowed"} if x.text is not None else {}
    out = {"x-lcguard-verdict": "allowed"}
    if approved.publishes:
        out["x-lcguard-handle"] = ",".join(p.handle for p in approved.publishes)
    if approved.consumed:
        out["x-lcguard-consumed"] = ",".join(m.handle for m in approved.consumed)
    return out
