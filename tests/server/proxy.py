"""What the tests of the proxy share: a policy, and a proxy as its clients see it.

The processes are started by ``tests/server/proxy_fixtures.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from lcguard.categories import CATEGORIES
from lcguard.commands.live_servers import Running, Site

BLOCK_TOKENS = 32
ENGINE_ARGS = ("--block-size", str(BLOCK_TOKENS), "--enable-prompt-tokens-details")
# behind the gate an allowed answer is lost in 3 of 4,000 draws of noise with this complaint ("back
# pain": 90), and every new site draws its own
NAME, COMPLAINT, SSN = "Ada Long", "cough", "912-55-1029"
ASK_COMPLAINT, ASK_SSN = "What is the chief complaint?", "What is the SSN?"
NOTE = f"The patient's name is {NAME}. Chief complaint: {COMPLAINT}. SSN: {SSN}."
ALL = list(CATEGORIES)


def _to(audience: str, forbid: list[str], **more: Any) -> dict[str, Any]:
    return {"source": "*", "audience": audience, "forbid": forbid, "guard": "gate"} | more


def _kin(source: str, audience: str, forbid: list[str], **more: Any) -> dict[str, Any]:
    return _to(audience, forbid, **more) | {"tenant": "kin", "source": source}


def _labs(source: str, audience: str, forbid: list[str], **more: Any) -> dict[str, Any]:
    return _kin(source, audience, forbid, **more) | {"tenant": "labs"}


def _scribes(source: str, audience: str, forbid: list[str]) -> dict[str, Any]:
    edge = {"source": source, "audience": audience, "forbid": forbid, "channel": "text"}
    return edge | {"tenant": "scribes"}


POLICY = {
    "version": 1,
    "categories": {
        "project_name": {
            "terms": [
                *("Zoë Unit 4711", "Zoë Unit 4712", "Blue Heron", "Grey Fox", "Kite"),
                *("Red Harbour", "Long March", "North Quay", "Élan", "Silver Birch"),
            ],
            "patterns": [r"PRJ-\d{4}"],
        }
    },
    "edges": [
        _to("open", [], guard="identity"),
        _to("clerk", [], guard="identity"),
        _to("banded", ALL, derive=["health", "finance"]),
        _to("hidden", ALL),
        _to("strict", ALL, guard="residual"),
        _to("brief", [], guard="identity", ttl_s=2),
        _to("frugal", [], guard="identity", max_segments=1, window_s=4),
        _to("rationed", [], guard="identity", max_segments=3),
        _to("screened", ["government_id"], guard="redact", detect="presidio"),
        _to("read", ["person", "government_id"], guard="redact", detect="lcguard"),
        _to("named", ["health", "government_id"], guard="redact"),
        _to("missed", ["government_id"], guard="twin"),
        _to("looked-twice", ["government_id"], guard="twin", detect="presidio"),
        _to("measured", ALL, length_bucket=1),
        _to("shut", [], guard="identity"),
        _to(
            "shut-redacted",
            ["government_id"],
            guard="identity",
            on_leak="redact",
            detect="presidio",
        ),
        _to("padded", [], guard="identity", fixed_length=True),
        _to("changing", [], guard="identity"),
        _to("partner", ALL),
        {"tenant": "acme"} | _to("partner", [], guard="identity"),
        # alice may tell bob, who may tell others, whom alice may not tell
        _kin("alice", "bob", [], guard="identity"),
        _kin("alice", "carol", ALL),
        _kin("alice", "dave", ["government_id"]),
        _kin("bob", "carol", [], guard="identity"),
        _kin("bob", "dave", []),
        _kin("bob", "erin", [], guard="identity", declassify=ALL),
        _kin("bob", "frank", ["government_id"], guard="redact"),
        _kin("alice", "frank", [], guard="identity"),
        _kin("dave", "erin", [], guard="identity"),
        # its own category: the team's names go no further
        _labs("lead", "team", ["project_name"], guard="redact"),
        _labs("lead", "peer", [], guard="identity"),
        _labs("peer", "team", [], guard="redact"),
        _labs("lead", "press", ["health"]),
        _labs("peer", "partner", [], guard="identity", declassify=["project_name"]),
        _labs("lead", "partner", ["project_name"], guard="redact"),
        # text, on the way to an agent's model and away from it
        _scribes("desk", "clerk", ["project_name", "person"]),
        _scribes("clerk", "desk", ["person"]),
        {"tenant": "clerks", "source": "intake", "audience": "billing", "channel": "text"}
        | {"forbid": ["person", "government_id"], "detect": "lcguard"},
        # as if nobody had written a policy: `redact`
        {"tenant": "unwritten", "source": "*", "audience": "*", "forbid": ALL},
        _to("*", ALL),
    ],
}
"""What the agent consumes under is its name; the last rule holds for all others."""


class Front:
    """A proxy as its clients see it."""

    def __init__(self, site: Site, running: Running) -> None:
        self.site, self.running, self.url = site, running, running.url
        self.keys: dict[tuple[str, str, str], str] = {}
        self.http = httpx.Client(base_url=running.url, timeout=300)  # a busy machine is no failure

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()

    def auth(
        self, agent: str, tenant: str = "default", role: Any = "agent", **more: Any
    ) -> dict[str, str]:
        """The header of an agent's key, made at the first use; with ``more`` always a new one."""
        name = (tenant, agent, role)
        if more or name not in self.keys:
            text = self.site.key(agent, tenant, role=role, **more)
            if more:
                return self.accepted({"Authorization": f"Bearer {text}"})
            self.accepted({"Authorization": f"Bearer {text}"})
            self.keys[name] = text
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def accepted(self, header: dict[str, str]) -> dict[str, str]:
        """Once the server has read the file that has the new key."""
        wait_for(lambda: self.http.get("/lcguard/v1/contract", headers=header).status_code == 200)
        return header

    def chat(
        self, who: Mapping[str, str], text: str, handoff: Any = None, **more: Any
    ) -> httpx.Response:
        """A chat of one message."""
        body: dict[str, Any] = {
            "model": "nano",
            "max_tokens": 16,
            "temperature": 0,
            "messages": [{"role": "user", "content": text}],
        }
        if handoff is not None:
            body["lcguard"] = handoff
        return self.http.post("/v1/chat/completions", json=body | more, headers=dict(who))

    def complete(self, who: Mapping[str, str], prompt: Any, **more: Any) -> httpx.Response:
        """A text completion."""
        body = {"model": "nano", "prompt": prompt, "max_tokens": 16, "temperature": 0} | more
        return self.http.post("/v1/completions", json=body, headers=dict(who))

    def publish(
        self,
        who: Mapping[str, str],
        audience: str | Sequence[str],
        note: str = NOTE,
        **publish: Any,
    ) -> httpx.Response:
        """A note as a system message, published."""
        return self.chat(
            who,
            "",
            {"publish": {"audience": audience} | publish},
            max_tokens=1,
            messages=[{"role": "system", "content": note}],
            add_generation_prompt=False,
        )

    def handle(self, who: Mapping[str, str], audience: str, note: str = NOTE, **more: Any) -> str:
        """Of a note that was published."""
        answer = self.publish(who, audience, note, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["lcguard"]["published"]["handle"])

    def ask(
        self, who: Mapping[str, str], question: str, *handles: str, **more: Any
    ) -> httpx.Response:
        """A question on what was consumed."""
        return self.chat(who, question, {"consume": list(handles)}, **more)

    def answer(self, who: Mapping[str, str], question: str, *handles: str) -> str:
        """The answer's text."""
        got = self.ask(who, question, *handles)
        assert got.status_code == 200, got.text
        return str(got.json()["choices"][0]["message"]["content"])

    def ready(self) -> dict[str, Any]:
        """What ``/readyz`` says."""
        return dict(self.http.get("/readyz").json())


def close_edges(folder: Path, *audiences: str) -> None:
    """As canaries did for agent ``intake``, in the file that a proxy takes over at its start."""
    edge = {"tenant": "default", "source": "intake", "since_s": 1.0, "state": "closed"}
    edge |= {"asr": 0.9, "asr_low": 0.8, "asr_high": 0.95}
    edges = [edge | {"audience": name, "reason": "a test"} for name in audiences]
    (folder / "leakage.json").write_text(json.dumps({"version": 1, "edges": edges}))


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and code."""
    return answer.status_code, str(answer.json()["error"]["code"])


def wait_for(what: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The first true value; the deadline only ends what hangs."""
    until = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.05)
    return found


@contextmanager
def front_of(
    site: Site, engine: Running | None, folder: Path, ready: bool = True, **settings: Any
) -> Iterator[Front]:
    """A further proxy before the same engine, with keys and a database of its own."""
    own = Site(folder)
    own.environment = site.environment
    keys = Site((folder / settings.get("keys", "keys.yaml")).parent)
    keys.key("nobody")
    shared = {"policy": str(site.policy), "store": site.store}
    with own.proxy(engine, ready=ready, **{**shared, **settings}) as running:
        with Front(keys, running) as front:
            yield front


def rewrite(path: Path, data: Any) -> None:
    """Replaces a file as an editor does."""
    work = path.with_name(f".{path.name}.new")
    work.write_text(json.dumps(data))
    work.replace(path)
