"""Guards an answer that comes in pieces, chunk by chunk of OpenAI's streams.

A value may be split over pieces at any character. What is sent is the beginning of what the guard
makes of the whole answer, so that a client reads the same streamed or not:

- by named values and terms alone, a text is held back as far as one may still begin in it: the
  letters of the longest, and an escape or a tag that is not over
- where an edge has a pattern, a detector or a head, which may look at any distance, all of it
  until it ends
- texts that are JSON, tool calls and whatever else is no running text, until the choice ends

What would have had to be hidden once it was sent (a field that went on behind another) ends the
stream with an error: nothing further is sent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.normalise import skeleton, unspaced
from lcguard.text.guard import TextGuard
from lcguard.text.rewriting import rewriting
from lcguard.text.search import Leaf, Search
from lcguard.text.walk import REASONING, ROLES, Spot
from lcguard.unescape import unescaped
from lcguard.value_search import SHORTEST

_TEXTS = ("content", "reasoning", "reasoning_content", "refusal", "text")
CONTEXT = 64
"""Characters before what is looked at that are read too: a short term is a word, or part of one."""
_PENDING = re.compile(
    r"(?:\\(?:u[0-9a-fA-F]{0,4}|x[0-9a-fA-F]{0,2})?)+$"
    r"|&(?:amp;)*[#A-Za-z0-9]{0,32}$"
    r"|(?:%[0-9a-fA-F]{2})*%[0-9a-fA-F]{0,2}$"
    r"|</?[A-Za-z]?[^<>]{0,201}$"
    r"|\[[A-Za-z0-9_-]{0,66}$"
)
"""An escape, a tag or a placeholder that may go on."""


def settled(text: str, letters: int, signs: int) -> int:
    """How far a text that goes on is sure: no value that is not whole yet begins before that.

    Args:
        letters: of the longest value, in its form without signs.
        signs: of the longest, with its signs.
    """
    pending = _PENDING.search(text)
    sure = len(text)
    for known in (text, text[: pending.start()]) if pending else (text,):
        sure = min(sure, len(known))
        bare, seen = skeleton(known), unspaced(known)
        forms = [(bare, letters), (seen, signs)]
        if (read := unescaped(known)) is not None:
            forms += [
                (skeleton(read.text).over(read), letters),
                (unspaced(read.text).over(read), signs),
            ]
        for form, longest in forms:
            first = len(form.text) - longest + 1
            sure = min(sure, form.starts[first] if first >= 0 else 0)
    return sure


def looks_anywhere(guard: TextGuard) -> bool:
    """Whether an edge has what may look at any distance: nothing is sent before an answer's end."""
    own = guard.edge.custom.values()
    return guard.edge.detect != "none" or any(c.patterns or c.heads for c in own)


def longest_of(search: Search) -> tuple[int, int]:
    """Of the longest value that may be split: its letters, and its characters with signs."""
    keys = [*search.named, *search.terms]
    return (
        max([SHORTEST, *(len(key.bare) for key in keys)]),
        max([2 * SHORTEST, *(len(key.signs) for key in keys)]),
    )


class _Field:
    """A running text of a choice."""

    def __init__(self) -> None:
        self.raw = ""
        self.passed = 0
        """Characters of ``raw`` that are decided."""
        self.sent = ""

    @property
    def start(self) -> int:
        return max(0, self.passed - CONTEXT)


class _Choice:
    """One answer."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self._texts: dict[str, _Field] = {}
        self._message: dict[str, Any] = {}
        """All of it, in the order in which its fields came."""

    def add(self, delta: Mapping[str, Any]) -> None:
        for name, value in delta.items():
            if value is None or value == "":
                continue
            if name in _TEXTS and isinstance(value, str):
                self._texts.setdefault(name, _Field()).raw += value
                self._message[name] = self._texts[name].raw
            elif name == "tool_calls" and isinstance(value, list):
                _join_calls(self._message.setdefault(name, []), value)
            elif isinstance(value, Mapping):
                self._message[name] = _joined(self._message.get(name) or {}, value)
            else:
                self._message[name] = value

    def ready(self) -> dict[str, str]:
        """What may be sent of each running text now."""
        named = sorted(self._texts.items(), key=lambda item: item[0] not in REASONING)
        fields = [field for _, field in named]
        leaves = [Leaf(f.raw[f.start :], i, None, Spot(0, i)) for i, f in enumerate(fields)]
        found = rewriting(leaves, self._stream.search.find(leaves), self._stream.guard.placeholders)
        out = {}
        for i, (name, field) in enumerate(named):
            if field.raw.lstrip()[:1] in ("", "{", "["):
                continue  # JSON, perhaps
            window, done = leaves[i].text, field.passed - field.start
            end = settled(window, *self._stream.longest)
            edits = sorted(e for e in found.edits.get(i, ()) if e[1] > done)
            for start, stop, _ in reversed(edits):
                if start < end < stop:
                    end = start
            if end <= done:
                continue
            made = window[done:end]
            for start, stop, placeholder in reversed([e for e in edits if e[1] <= end]):
                start = max(start, done)
                made = made[: start - done] + placeholder + made[stop - done :]
            field.passed = field.start + end
            field.sent += made
            out[name] = made
        return out

    def rest(self) -> dict[str, Any]:
        """Everything that was not sent. Raises ``HandoffError`` where what was sent would have had
        to be hidden."""
        stream = self._stream
        text = self._message.pop("text", None)
        choice: dict[str, Any] = {"message": self._message}
        choice |= {"text": text} if text is not None else {}
        found = stream.guard.choices([choice], stream.secrets)
        stream.hidden.update(found.hidden)
        stream.originals |= found.originals
        (made,) = found.value
        whole: dict[str, Any] = made["message"] | ({"text": made["text"]} if "text" in made else {})
        out = dict(whole)
        for name, field in self._texts.items():
            if not whole[name].startswith(field.sent):
                raise HandoffError(
                    400,
                    "a value came to light that begins in what was already sent: the answer ends "
                    "here; ask for it without stream",
                )
            out[name] = whole[name][len(field.sent) :]
            if not out[name]:
                del out[name]
        return out


class AnswerStream:
    """Guards the chunks of one answer, in order."""

    def __init__(self, guard: TextGuard, secrets: Sequence[str] | None = None) -> None:
        """Raises ``HandoffError`` (400) as ``TextGuard.json`` where values must be named."""
        self.guard, self.secrets = guard, secrets
        self.search: Search = guard.search(secrets)
        self.whole = looks_anywhere(guard)
        self.longest = longest_of(self.search)
        self.hidden: Counter[str] = Counter()
        """Of the choices that have ended."""
        self.originals: dict[str, str] = {}
        self._choices: dict[int, _Choice] = {}

    def feed(self, chunk: Mapping[str, Any]) -> dict[str, Any] | None:
        """What goes on of a chunk now; None for nothing.

        Raises ``HandoffError`` where no more may be sent.
        """
        choices = []
        for choice in chunk.get("choices", ()):
            made = self._choice(choice)
            if made is not None:
                choices.append(made)
        return {**chunk, "choices": choices} if choices else None

    def _choice(self, choice: Mapping[str, Any]) -> dict[str, Any] | None:
        index = int(choice.get("index", 0))
        state = self._choices.setdefault(index, _Choice(self))
        is_chat = "delta" in choice
        delta = dict(choice.get("delta") or {}) if is_chat else {"text": choice.get("text")}
        role = delta.pop("role", None)
        begun = {"role": role} if role in ROLES else {}
        if begun and delta.get("content") == "":
            begun["content"] = ""
        if role is not None and not begun:
            delta["role"] = role
        state.add(delta)
        stop = choice.get("stop_reason")
        if isinstance(stop, str):
            state.add({"stop_reason": stop})
        ended = choice.get("finish_reason") is not None
        made = begun | (state.rest() if ended else {} if self.whole else state.ready())
        if not (made or ended):
            return None
        out = {**choice}
        if isinstance(stop, str):
            out["stop_reason"] = made.pop("stop_reason", None)
        if is_chat:
            out["delta"] = made
        else:
            out["text"] = made.get("text", "")
        return out


def _join_calls(calls: list[dict[str, Any]], more: Sequence[Any]) -> None:
    """Adds the pieces of tool calls to those that are there, by their index."""
    for piece in more:
        if not isinstance(piece, Mapping):
            raise HandoffError(400, "a tool call of the answer is no object: it cannot be guarded")
        index = piece.get("index", len(calls))
        at = next((i for i, c in enumerate(calls) if c.get("index") == index), None)
        if at is None:
            calls.append({**piece, "index": index})
        else:
            calls[at] = _joined(calls[at], {k: v for k, v in piece.items() if k != "index"})


def _joined(first: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Pieces of an object: strings one behind the other, but for words that are said again."""
    out = dict(first)
    for name, value in more.items():
        old = out.get(name)
        if value is None:
            continue
        if isinstance(old, str) and isinstance(value, str) and name not in ("type", "id"):
            out[name] = old + value
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            out[name] = _joined(old, value)
        else:
            out[name] = value
    return out
