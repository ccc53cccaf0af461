"""Guards a response that comes in pieces, event by event of OpenAI's Responses API.

As in ``stream``: what is sent is the beginning of what the guard makes of the whole answer. Events
keep their order, and the texts of an answer's items are one text here, one behind the other: an
item's last words, and the events that repeat it, wait until nothing behind them can belong to them.
Calls of tools, JSON and all that comes behind them wait for the answer's end; from there on every
event says what the whole answer does. Events are numbered anew.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcguard.handoff.errors import HandoffError
from lcguard.text.guard import TextGuard
from lcguard.text.rewriting import rewriting
from lcguard.text.search import Leaf
from lcguard.text.stream import CONTEXT, longest_of, looks_anywhere, settled
from lcguard.text.walk import Spot, is_made

Event = dict[str, Any]
_BEGIN = ("response.created", "response.queued", "response.in_progress")
END = ("response.completed", "response.incomplete")
_DELTAS = {
    "response.output_text": "text",
    "response.reasoning_text": "text",
    "response.refusal": "refusal",
}
"""What the events of a running text are called before ``.delta`` and ``.done``, and its field."""
_CALLS = {
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
}
_RUNNING = ("message", "reasoning")
"""Items that are running text."""
_GAP = "\n"


class _Text:
    """A running text: a part of an item's content."""

    def __init__(self, event: Event) -> None:
        self.place = _place(event)
        self.raw = ""
        self.start = 0
        """Where it begins among all texts of the answer."""
        self.passed = 0
        """Characters of ``raw`` that are decided."""
        self.ready = self.sent = ""
        """Guarded, and not in an event yet; what was in events."""
        self.ended = self.whole = False
        """Whether the engine has said all of it; whether all of it is decided."""

    @property
    def end(self) -> int:
        return self.start + len(self.raw)


class ResponseStream:
    """Guards the events of one answer, in order."""

    def __init__(self, guard: TextGuard, secrets: Sequence[str] | None = None) -> None:
        """Raises ``HandoffError`` (400) as ``TextGuard.json`` where values must be named."""
        self.guard, self.secrets = guard, secrets
        self.search = guard.search(secrets)
        self.longest = longest_of(self.search)
        self.hidden: Counter[str] = Counter()
        """Of the answer, once it has ended."""
        self.originals: dict[str, str] = {}
        self._waits = looks_anywhere(guard)
        """Whether nothing more is sent before the end."""
        self._held: deque[Event] = deque()
        self._texts: list[_Text] = []
        self._decided = 0
        self._number = 0

    def feed(self, event: Mapping[str, Any]) -> list[Event]:
        """The events that go on now.

        Raises ``HandoffError`` where no more may be sent.
        """
        kind = event.get("type")
        if kind in _BEGIN:
            if event["response"].get("output"):
                raise _unread(kind)
            return [self._numbered({**event})]
        if kind in END:
            return [self._numbered(e) for e in self._ended({**event})]
        self._held.append({**event})
        self._note(self._held[-1], str(kind))
        if self._waits:
            return []
        self._decide()
        return [self._numbered(e) for e in self._released()]

    def _numbered(self, event: Event) -> Event:
        if "sequence_number" in event:
            event["sequence_number"] = self._number
        self._number += 1
        return event

    def _note(self, event: Event, kind: str) -> None:
        """Takes up what an event says. Raises ``HandoffError`` for one that cannot be guarded."""
        name, _, step = kind.rpartition(".")
        if name in _CALLS:
            self._waits = True
        elif kind == "response.output_item.added":
            item = event["item"]
            plain = item["type"] in _RUNNING and is_made("id", item.get("id"))
            if not plain or item.get("content") or item.get("summary"):
                self._waits = True
        elif kind == "response.content_part.added":
            part = event["part"]
            if part["type"] not in ("output_text", "reasoning_text", "refusal"):
                raise _unread(f"{kind} of a {part['type']}")
            text = _Text(event)
            if self._texts and not self._texts[-1].ended:
                raise _unread(f"{kind} within another")
            text.start = self._texts[-1].end + len(_GAP) if self._texts else 0
            text.raw = part.get("text") or part.get("refusal") or ""
            self._texts.append(text)
        elif name in _DELTAS:
            text = self._texts[-1] if self._texts else _Text(event)
            if text.place != _place(event) or text.ended:
                raise _unread(f"{kind} out of its order")
            if step == "delta":
                text.raw += event["delta"]
            elif text.raw != event[_DELTAS[name]]:
                raise _unread(f"{kind} with another text")
            else:
                text.ended = True
        elif kind not in ("response.content_part.done", "response.output_item.done"):
            raise _unread(kind)

    def _decide(self) -> None:
        """Guards what is sure of the texts by now."""
        first = max(0, self._decided - CONTEXT)
        texts = [t for t in self._texts if t.end >= first]
        if not texts:
            return
        cuts = [max(0, first - t.start) for t in texts]
        spots = [Spot(0, t.place[0]) for t in texts]
        leaves = [
            Leaf(t.raw[cut:], i, None, spot)
            for i, (t, cut, spot) in enumerate(zip(texts, cuts, spots, strict=True))
        ]
        hits = self.search.find(leaves)
        edits = rewriting(leaves, hits, self.guard.placeholders).edits
        at = [t.start + cut for t, cut in zip(texts, cuts, strict=True)]
        end = at[0] + settled(_GAP.join(leaf.text for leaf in leaves), *self.longest)
        for text in texts:
            if text.raw.lstrip()[:1] in ("{", "[") or (not text.raw.strip() and not text.ended):
                end = min(end, text.start)  # JSON, perhaps
        # what is hidden is hidden as a whole, over the end of a text too
        spans = [(at[i] + a, at[i] + b) for i, found in edits.items() for a, b, _ in found]
        spans += [
            (
                at[hit.pieces[0][0]] + hit.pieces[0][1][0],
                at[hit.pieces[-1][0]] + hit.pieces[-1][1][1],
            )
            for hit in hits
        ]
        for start, stop in sorted(spans, reverse=True):
            if start < end < stop:
                end = start
        for i, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
            until = min(len(text.raw), end - text.start)
            if until > text.passed:
                text.ready += _rewritten(text, cut, until, edits.get(i, ()))
                text.passed = until
            text.whole |= text.ended and end >= text.end
        self._decided = max(self._decided, end)

    def _released(self) -> Iterator[Event]:
        """The held events that say nothing but what is decided."""
        while self._held:
            event = self._held[0]
            name, _, step = str(event["type"]).rpartition(".")
            if name in _DELTAS:
                text = self._text(event)
                if step == "done" and not text.whole:
                    return
                yield from self._said(event, name, step, text)
            elif event["type"] == "response.content_part.done":
                text = self._text(event)
                event["part"] = _with_text(event["part"], text.sent)
                yield event
            elif event["type"] == "response.output_item.done":
                index = event["output_index"]
                sent = {t.place[1]: t.sent for t in self._texts if t.place[0] == index}
                parts = event["item"].get("content") or []
                if event["item"].get("summary") or len(parts) > len(sent):
                    self._waits = True
                    return
                made = [_with_text(p, sent.get(i, "")) for i, p in enumerate(parts)]
                event["item"] = {**event["item"], "content": made}
                yield event
            elif event["type"] == "response.content_part.added":
                event["part"] = _with_text(event["part"], "")
                yield event
            else:
                yield event
            self._held.popleft()

    def _said(self, event: Event, name: str, step: str, text: _Text) -> Iterator[Event]:
        """A delta with what may be said by now, and in front of a text's end what is left of it."""
        if text.ready:
            text.sent += text.ready
            yield _delta(event, name, text.ready)
            text.ready = ""
        if step == "done":
            yield {**event, _DELTAS[name]: text.sent}

    def _ended(self, event: Event) -> Iterator[Event]:
        """All that was held, as the whole answer has it. Raises ``HandoffError`` where what was
        sent would have had to be hidden."""
        response = event["response"]
        found = self.guard.output(response["output"], self.secrets)
        self.hidden.update(found.hidden)
        self.originals |= found.originals
        for text in self._texts:
            if not _final(found.value, text.place).startswith(text.sent):
                raise HandoffError(
                    400,
                    "a value came to light that begins in what was already sent: the answer ends "
                    "here; ask for it without stream",
                )
        said = {t.place: len(t.sent) for t in self._texts}
        for held in self._held:
            yield from _as_whole(held, found.value, said)
        self._held.clear()
        yield {**event, "response": {**response, "output": found.value}}

    def _text(self, event: Event) -> _Text:
        return next(t for t in self._texts if t.place == _place(event))


def _as_whole(
    event: Event, items: Sequence[Mapping[str, Any]], said: dict[tuple[int, int], int]
) -> Iterator[Event]:
    """A held event, as the whole answer has its item.

    ``said``: by place how much of the text was in a delta; a call's arguments are at -1.
    """
    kind, index = str(event["type"]), event["output_index"]
    name, _, step = kind.rpartition(".")
    if not 0 <= index < len(items):
        raise _unread(f"{kind} of no item")
    item = items[index]
    if "item_id" in event:
        event["item_id"] = item.get("id")
    if name in _DELTAS or name in _CALLS:
        place = _place(event) if name in _DELTAS else (index, -1)
        field = _DELTAS.get(name) or _CALLS[name]
        whole = _final(items, place) if name in _DELTAS else str(item.get(field, ""))
        if rest := whole[said.get(place, 0) :]:
            said[place] = len(whole)
            yield _delta(event, name, rest)
        if step == "done":
            more = {"name": item.get("name")} if "name" in event else {}
            yield {**event, field: whole, **more}
    elif kind == "response.output_item.added":
        held = event["item"]
        begun = {k: v if k == "status" else _begun(k, v, item.get(k)) for k, v in held.items()}
        yield {**event, "item": begun}
    elif kind == "response.output_item.done":
        yield {**event, "item": {k: item.get(k) for k in event["item"]}}
    else:
        text = "" if kind == "response.content_part.added" else _final(items, _place(event))
        yield {**event, "part": _with_text(event["part"], text)}


def _begun(name: str, held: Any, whole: Any) -> Any:
    """A field of an item that has just begun: what grows is empty."""
    grows = name in ("content", "summary", "arguments", "input") and held is not None
    return type(held)() if grows else whole


def _place(event: Mapping[str, Any]) -> tuple[int, int]:
    """Item and part."""
    return event["output_index"], event["content_index"]


def _final(items: Sequence[Mapping[str, Any]], place: tuple[int, int]) -> str:
    """A part's text in the whole answer; empty where an empty part was left out."""
    index, part = place
    parts = items[index].get("content") or [] if index < len(items) else []
    found = parts[part] if part < len(parts) else {}
    return str(found.get("text") or found.get("refusal") or "")


def _with_text(part: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {**part, "refusal" if part["type"] == "refusal" else "text": text}


def _delta(event: Event, name: str, text: str) -> Event:
    kept = ("sequence_number", "item_id", "output_index", "content_index", "logprobs")
    shown = {k: v for k, v in event.items() if k in kept}
    return {"type": f"{name}.delta", **shown, "delta": text}


def _rewritten(text: _Text, cut: int, until: int, edits: Sequence[tuple[int, int, str]]) -> str:
    """What stands there between what is decided and ``until``, with its values hidden."""
    made, done = text.raw[text.passed : until], text.passed
    for a, b, placeholder in sorted(edits, reverse=True):
        start, stop = max(a + cut, done), b + cut
        if done < stop <= until:
            made = made[: start - done] + placeholder + made[stop - done :]
    return made


def _unread(what: object) -> HandoffError:
    return HandoffError(400, f"{what}: an event of the answer that cannot be guarded")
