"""A small client of the proxy for tests, and what a test can see of it from outside."""

from __future__ import annotations

import http.client
import json
import re
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lcguard.commands.live_servers import Running

DONE = "[DONE]"


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def reason(self) -> str:
        """The message of an error, which every refusal has."""
        message = self.json["error"]["message"]
        assert isinstance(message, str)
        assert message
        return message

    @property
    def handle(self) -> str:
        """Of what was published."""
        assert self.status == 200, self.data
        return str(self.json["lcguard"]["published"]["handle"])


@dataclass
class Client:
    """One agent. ``acknowledged`` keeps the handle of every publish that was answered with 200."""

    url: str
    key: str = ""
    acknowledged: list[str] = field(default_factory=list)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> Answer:
        """One request on a connection of its own; ``body`` as JSON, or as the bytes it is."""
        with closing(self._connection(timeout_s)) as connection:
            self._send(connection, method, path, body, headers)
            got = connection.getresponse()
            names = {k.lower(): v for k, v in got.getheaders()}
            answer = Answer(got.status, names, got.read())
        if answer.status == 200 and (handle := names.get("x-lcguard-handle")):
            self.acknowledged.append(handle)
        return answer

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def ask(self, prompt: str, handoff: Any = None, max_tokens: int = 2, **more: Any) -> Answer:
        """A text completion."""
        return self.request("POST", "/v1/completions", asked(prompt, handoff, max_tokens, **more))

    def publish(self, prompt: str, audience: str = "billing", **more: Any) -> Answer:
        return self.ask(prompt, {"publish": {"audience": audience}}, **more)

    def consume(self, handle: str, prompt: str = "What is it?", **more: Any) -> Answer:
        return self.ask(prompt, {"consume": [handle]}, **more)

    @contextmanager
    def stream(
        self, prompt: str, handoff: Any = None, max_tokens: int = 2, **more: Any
    ) -> Iterator[Iterator[Any]]:
        """The events of a stream, ``DONE`` or JSON; leaving the block hangs up."""
        body = asked(prompt, handoff, max_tokens, stream=True, **more)
        with closing(self._connection(120.0)) as connection:
            self._send(connection, "POST", "/v1/completions", body, None)
            got = connection.getresponse()
            assert got.status == 200, got.read()
            yield _events(got)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any,
        headers: dict[str, str] | None,
    ) -> None:
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            own["Content-Type"] = "application/json"
        connection.request(method, path, body, own | (headers or {}))


def asked(prompt: Any, handoff: Any = None, max_tokens: int = 2, **more: Any) -> dict[str, Any]:
    """The body of a text completion of exactly ``max_tokens``."""
    body = {
        "model": "nano",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    return body | ({"lcguard": handoff} if handoff is not None else {})


def _events(got: http.client.HTTPResponse) -> Iterator[Any]:
    while line := got.readline():
        if line.startswith(b"data: "):
            text = line[6:].decode().strip()
            yield text if text == DONE else json.loads(text)


def until(true: Callable[[], object], timeout_s: float, what: str) -> None:
    """Waits. Raises ``AssertionError`` naming ``what`` did not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def engine_of(proxy: Running) -> tuple[int, str]:
    """Process id and base URL of the vLLM that a proxy has started."""
    for folder in Path("/proc").iterdir():
        try:
            if (
                not folder.name.isdigit()
                or f"\nPPid:\t{proxy.process.pid}\n" not in (folder / "status").read_text()
            ):
                continue
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # ended meanwhile
            continue
        if "--port" in words:
            return int(folder.name), f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    raise AssertionError(f"process {proxy.process.pid} runs no vLLM")


def n_running(engine_url: str) -> int:
    """Requests that vLLM computes or has in its line now."""
    return int(sum(_figures(engine_url, "num_requests_(?:running|waiting)", 2)))


def n_generated(engine_url: str) -> int:
    """Tokens that vLLM has generated since it started."""
    return int(sum(_figures(engine_url, "generation_tokens_total", 1)))


def _figures(engine_url: str, name: str, at_least: int) -> list[float]:
    """Of vLLM's own metrics."""
    asked = urllib.request.Request(
        engine_url + "/metrics", headers={"Authorization": f"Bearer {_engine_key(engine_url)}"}
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^vllm:{name}\{{.*\}} ([0-9.e+]+)$", text, re.M)
    assert len(found) >= at_least, "vLLM's metrics have other names"
    return list(map(float, found))


def _engine_key(engine_url: str) -> str:
    """The key that the proxy has given its vLLM: its owner can see the environment."""
    port = engine_url.rpartition(":")[2].encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"--port\0" + port in (folder / "cmdline").read_bytes():
                environment = (folder / "environ").read_bytes().decode().split("\0")
                return dict(e.split("=", 1) for e in environment if "=" in e)["VLLM_API_KEY"]
        except OSError:  # ended meanwhile
            continue
    raise AssertionError(f"nothing runs at {engine_url}")


def audit_rows(database: Path, where: str = "1", *values: Any) -> list[dict[str, Any]]:
    """Rows of the trail, in order."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as found:
        found.row_factory = sqlite3.Row
        return [
            dict(row)
            for row in found.execute(f"SELECT * FROM audit WHERE {where} ORDER BY seq", values)
        ]
