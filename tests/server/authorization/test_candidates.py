"""An audience that publishes candidates cannot tell which one equals a segment that it received.

Two agents under one rule: ``reader`` receives a note, ``control`` another one. Both publish the
same candidates, one of them word for word what the reader received, and collect whatever they are
shown. A field gives the note away where it agrees with the received segment's for the true
candidate alone, or where the true candidate alone differs from what the control agent sees.

    LCGUARD_CANDIDATES=400 python -m pytest tests/server/authorization/test_candidates.py

Times are left out: they are no field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from lcguard.commands.live_servers import Site
from lcguard.segment import KVSegment
from lcguard.store import open_store
from tests.engine import needs_vllm
from tests.server.proxy import Front, wait_for

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

N = int(os.environ.get("LCGUARD_CANDIDATES", "24"))
TRUE = N // 3
NAMES = ("Ada Long", "Bo Li", "Constance Featherstonehaugh", "Max Roth", "Ina Mayer")
Fields = dict[str, str]


def note(i: int) -> str:
    """Candidates differ in a number, some in a name of another length as well."""
    name = NAMES[0] if i % 3 == TRUE % 3 else NAMES[i % len(NAMES)]
    return f"The patient's name is {name}. Chief complaint: cough. SSN: 912-55-{1000 + 7 * i}."


def flat(value: Any, path: str = "") -> Fields:
    """Every leaf of JSON under its path; places in lists are part of the path."""
    if isinstance(value, Mapping):
        return {k: v for n, x in value.items() for k, v in flat(x, f"{path}.{n}").items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{path}[{i}]").items()}
    return {path: json.dumps(value)}


def answer(got: httpx.Response, name: str) -> Fields:
    """Status, headers and body."""
    head = {f"{name} header {k}": v for k, v in got.headers.items()}
    if got.headers["content-type"].startswith("text/event-stream"):
        events = [e[6:] for e in got.text.split("\n\n") if e.startswith("data: {")]
        body: Any = [json.loads(e) for e in events]
    else:
        body = got.json()
    return head | flat(body, name) | {f"{name} status": str(got.status_code)}


class Eyes:
    """All that one agent can look at."""

    def __init__(self, front: Front, site: Site, agent: str) -> None:
        self.front, self.agent, self.who = front, agent, front.auth(agent)
        self.store = open_store(site.store)
        self.key = bytes.fromhex(site.environment["LCGUARD_KEY"])

    def segment(self, handle: str) -> KVSegment:
        """Its bytes, for an agent that can read the store."""
        return self.store.load(handle, self.key)

    def of_segment(self, handle: str) -> Fields:
        """What one is shown of a segment that one may consume."""
        http, who = self.front.http, self.who
        out = answer(http.get(f"/lcguard/v1/segments/{handle}", headers=who), "inspect")
        rows = http.get("/lcguard/v1/segments", headers=who).json()["data"]
        out |= flat(next(r for r in rows if r["handle"] == handle), "list")
        out |= answer(self.front.ask(who, "What is the SSN?", handle), "ask")
        more = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        out |= answer(self.front.ask(who, "Why?", handle, max_tokens=3, **more), "stream")
        out |= answer(self.front.ask(who, "word " * 5000, handle), "too long")
        out |= answer(self.front.ask(who, "Why?", handle, min_tokens=99999), "too much")
        out |= answer(self.front.ask(who, "Why?", handle, logprobs=True), "refused")
        manifest = self.segment(handle).manifest
        return out | flat(manifest.model_dump(mode="json"), "bytes")

    def of_candidate(self, text: str) -> tuple[Fields, str]:
        """What one is shown on publishing a text to oneself; and the handle."""
        made = self.front.publish(self.who, self.agent, text)
        out, handle = answer(made, "publish"), made.headers["x-lcguard-handle"]
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "nano", "prompt": text, "max_tokens": 1, "temperature": 0}
        publish = {"lcguard": {"publish": {"audience": self.agent}}}
        post = self.front.http.post
        out |= answer(
            post("/v1/completions", json=body | publish | stream, headers=self.who),
            "streamed publish",
        )
        out |= answer(post("/v1/completions", json=body, headers=self.who), "plain")
        named = {"lcguard": {"publish": {"audience": self.agent, "secrets": [text[:9]]}}}
        out |= answer(post("/v1/completions", json=body | named, headers=self.who), "refused")
        return out | self.of_segment(handle), handle


def rows(segment: KVSegment) -> set[bytes]:
    """Each token's keys and values of each layer."""
    both = (segment.keys, segment.values)
    return {r.numpy().tobytes() for t in both for r in t.transpose(1, 2).flatten(2).flatten(0, 1)}


class Game:
    """One note received; the same candidates published by who received it and by who did not."""

    def __init__(self, front: Front, site: Site) -> None:
        intake = front.auth("intake")
        self.reader, self.control = Eyes(front, site, "reader"), Eyes(front, site, "control")
        received = front.handle(intake, "reader", note(TRUE))
        front.handle(intake, "control", "The visit was on a Monday. Nothing else is known.")
        self.before = self.reader.of_segment(received)
        self.received = rows(self.reader.segment(received))

    def told(self) -> tuple[set[str], list[Fields]]:
        """The fields that tell the true candidate from the others, and all that was seen."""
        seen: list[Fields] = []
        same: list[set[str]] = []
        for i in range(N):
            mine, handle = self.reader.of_candidate(note(i))
            other, _ = self.control.of_candidate(note(i))
            shared = len(self.received & rows(self.reader.segment(handle)))
            mine["bytes rows in common"] = other["bytes rows in common"] = str(shared)
            seen.append(mine)
            same.append({k for k in mine if mine[k] == other.get(k)})
        out = set()
        for name in set().union(*seen):
            value = self.before.get(name)
            agree = {i for i, f in enumerate(seen) if name in f and f[name] == value}
            if value is not None and agree == {TRUE}:
                out.add(f"{name}: equal to the received segment's for the true candidate alone")
            as_control = {i for i in range(N) if name in same[i]}
            if as_control in ({TRUE}, set(range(N)) - {TRUE}):
                out.add(f"{name}: the true candidate alone looks otherwise to who received it")
        return out, seen


def test_no_field_tells_the_true_candidate_from_others(front: Front, site: Site) -> None:
    """The noise of each publish is its own and turns an answer's words once in a hundred, the true
    candidate's alone about once in a hundred rounds: a leak is what tells it in every round."""
    game = Game(front, site)
    leaks, seen = game.told()
    for _ in range(2):
        if leaks:
            leaks &= game.told()[0]
    assert not leaks
    assert len(set().union(*seen)) > 150, "nothing was looked at"
    assert {f["bytes rows in common"] for f in seen} == {"0"}
    # what all of it is about: the figures that told it
    shown = [name for name in game.before if "bytes" not in name]
    assert not any("withheld" in name or "tensor" in name for name in shown)


def test_an_audience_sees_lengths_in_buckets(front: Front) -> None:
    """Two segments of other lengths in one bucket look the same; their publisher sees both."""
    intake, reader = front.auth("intake"), front.auth("reader")
    texts = ["Blood pressure is fine.", "Blood pressure is fine, and so is all else."]
    handles = [front.handle(intake, "reader", t) for t in texts]

    def lengths(who: dict[str, str]) -> list[set[int]]:
        found = front.http.get("/lcguard/v1/segments", headers=who).json()["data"]
        listed = {s["handle"]: s["n_tokens"] for s in found}
        one = [front.http.get(f"/lcguard/v1/segments/{h}", headers=who).json() for h in handles]
        assert all("n_tokens" not in s["manifest"] for s in one)
        return [{listed[h], s["n_tokens"]} for h, s in zip(handles, one, strict=True)]

    short, long = lengths(intake)
    assert short != long
    assert len(short) == len(long) == 1
    assert lengths(reader) == lengths(front.auth("eve", role="auditor")) == [{64}, {64}]
    assert lengths(front.auth("root", role="admin")) == [short, long]

    def visible(handle: str, **more: Any) -> list[Any]:
        """Usage and length of an answer, as a whole and as a stream, and of one cut off at the
        model's end."""
        out = []
        for options in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            got = front.ask(reader, "Why?", handle, ignore_eos=True, **options, **more)
            events = [json.loads(e[6:]) for e in got.text.split("\n\n") if e.startswith("data: {")]
            found = [e for e in events if "usage" in e] if options else [got.json()]
            out += [(got.status_code, e.get("usage"), e.get("error")) for e in found]
        return out

    assert visible(handles[0]) == visible(handles[1])
    filled = "word " * 880
    ends = [
        visible(h, max_tokens=900, messages=[{"role": "user", "content": filled}]) for h in handles
    ]
    assert ends[0] == ends[1]


def test_figures_for_anybody_count_lengths_in_buckets(front: Front) -> None:
    """One agent alone on the proxy sees by its counter what its request is said to have taken."""
    intake, reader = front.auth("intake"), front.auth("reader")
    handle = front.handle(intake, "reader", "Blood pressure is fine.")

    def tokens() -> float:
        text = front.http.get("/metrics", headers=front.auth("root", role="admin")).text
        return float(text.split("\nlcguard_tokens_total ")[1].split()[0])

    def used(**more: Any) -> int:
        got = front.ask(reader, "Why?", handle, **more)
        if not more:
            return int(got.json()["usage"]["total_tokens"])
        events = [json.loads(e[6:]) for e in got.text.split("\n\n") if e.startswith("data: {")]
        return int(next(e["usage"]["total_tokens"] for e in events if e.get("usage")))

    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        before = tokens()
        wanted = before + used(**more)
        wait_for(lambda wanted=wanted: tokens() == wanted)
