"""The Python client before a real proxy and engine, both of its kinds."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, PermissionDeniedError
from openai.types.responses import Response

from lcguard.client import AsyncClient, Client, Published
from lcguard.commands.live_servers import Running
from tests.docs.blocks import block
from tests.engine import needs_vllm
from tests.server.proxy import ALL, ASK_COMPLAINT, ASK_SSN, COMPLAINT, NAME, NOTE, SSN, Front

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Waiting:
    """An ``AsyncClient`` whose methods are waited for, so that both kinds pass the same test."""

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self.loop = client, loop

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            return self.loop.run_until_complete(getattr(self.client, name)(*args, **options))

        return call


@pytest.fixture(params=["sync", "async"])
def agent(request: pytest.FixtureRequest, front: Front) -> Iterator[Any]:
    """Makes the client of an agent in the tenant whose edges are all `redact`."""
    loop, clients = asyncio.new_event_loop(), list[Any]()

    def made(name: str) -> Any:
        key = front.auth(name, "unwritten")["Authorization"].removeprefix("Bearer ")
        url = f"{front.url}/v1"
        sync = request.param == "sync"
        clients.append(Client(url, key) if sync else Waiting(AsyncClient(url, key), loop))
        return clients[-1]

    yield made
    for client in clients:
        client.close()
    loop.run_until_complete(asyncio.sleep(0.1))  # or their sockets outlive the loop
    loop.close()
    gc.collect()  # what is left open is this test's failure, not a later one's


def test_a_note_is_published_asked_about_inspected_and_revoked(agent: Any) -> None:
    intake, billing, mallory = (agent(name) for name in ("intake", "billing", "mallory"))
    sent = intake.publish(NOTE, "billing", secrets=[NAME, SSN], ttl_s=600)
    assert isinstance(sent, Published)
    assert (sent.source, sent.audience, sent.guard) == ("intake", "billing", "redact")
    assert sent.forbid == tuple(ALL)
    assert sent.redacted_spans == 2
    answer = {"max_tokens": 24, "temperature": 0}
    assert COMPLAINT in billing.ask(ASK_COMPLAINT, sent, **answer)
    assert SSN not in billing.ask(ASK_SSN, sent.handle, **answer)
    whole = billing.consume([{"role": "user", "content": ASK_COMPLAINT}], [sent], **answer)
    assert COMPLAINT in whole.choices[0].message.content
    assert whole.lcguard["consumed"][0]["handle"] == sent.handle
    seen = billing.inspect(sent)
    assert (seen.handle, seen.source) == (sent.handle, "intake")
    assert seen.manifest["guard_digest"]
    assert seen.n_tokens >= sent.n_tokens
    assert sent.handle in {s.handle for s in intake.segments()}
    with pytest.raises(PermissionDeniedError, match="segment"):
        mallory.ask(ASK_COMPLAINT, sent, **answer)
    with pytest.raises(NotFoundError):
        mallory.inspect(sent)
    assert intake.revoke(sent).revoked == (sent.handle,)
    with pytest.raises(APIStatusError, match="segment"):
        billing.ask(ASK_COMPLAINT, sent, **answer)
    assert {"intake", "billing"} >= {e.source for e in intake.leakage() if e.audience == "billing"}


def test_a_note_goes_to_several_at_once(agent: Any) -> None:
    intake, billing, desk = (agent(name) for name in ("intake", "billing", "desk"))
    sent = intake.publish(NOTE, audience=["billing", "desk"], secrets=[NAME, SSN])
    assert [type(one) for one in sent] == [Published, Published]
    assert [one.audience for one in sent] == ["billing", "desk"]
    answer = {"max_tokens": 24, "temperature": 0}
    for who, mine, other in ((billing, *sent), (desk, *reversed(sent))):
        assert COMPLAINT in who.ask(ASK_COMPLAINT, mine, **answer)
        with pytest.raises(PermissionDeniedError, match="not for agent"):
            who.ask(ASK_COMPLAINT, other, **answer)
    assert intake.revoke(sent[0]).revoked == (sent[0].handle,)
    assert COMPLAINT in desk.ask(ASK_COMPLAINT, sent[1], **answer)
    (one,) = intake.publish(NOTE, ("billing",), secrets=[])  # a list is answered by a list
    assert one.audience == "billing"


def test_a_response_is_given_on_top_of_segments(agent: Any) -> None:
    intake, billing = agent("intake"), agent("billing")
    sent = intake.publish(NOTE, "billing", secrets=[NAME, SSN])
    options = {"max_output_tokens": 24, "temperature": 0}
    got = billing.respond(ASK_COMPLAINT, sent, **options)
    assert isinstance(got, Response)
    assert COMPLAINT in got.output_text
    assert got.lcguard["consumed"][0]["handle"] == sent.handle
    items = [{"role": "user", "content": ASK_SSN}]
    assert SSN not in billing.respond(items, sent.handle, **options).output_text
    plain = intake.respond(ASK_COMPLAINT, instructions=NOTE, **options)
    assert COMPLAINT in plain.output_text
    assert not hasattr(plain, "lcguard")
    with pytest.raises(PermissionDeniedError, match="segment"):
        agent("mallory").respond(ASK_SSN, sent, **options)


def test_a_response_hands_text_over(front: Front) -> None:
    """The prompt as it came from another agent, the answer as another may have it."""
    key = front.auth("clerk", "scribes")["Authorization"].removeprefix("Bearer ")
    told = {"secrets": ["Ada Long"], "conversation": "case 7", "max_output_tokens": 8}
    with Client(f"{front.url}/v1", key) as clerk:
        got = clerk.respond(NOTE, source="desk", audience="desk", temperature=0, **told)
        assert got.lcguard["text"]["source"] == "desk"
        assert got.lcguard["text"]["audience"] == "desk"
        with pytest.raises(PermissionDeniedError, match="channel: text"):
            clerk.respond(NOTE, audience="hidden", secrets=[])


def test_the_documented_lines_run(
    front: Front, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LCGUARD_URL", f"{front.url}/v1")
    for name in ("intake", "billing"):
        key = front.auth(name, "unwritten")["Authorization"].removeprefix("Bearer ")
        monkeypatch.setenv(f"{name.upper()}_KEY", key)
    names: dict[str, Any] = {}
    exec(block("docs/proxy.md", "lcguard.client"), names)
    for name in ("intake", "billing"):
        names[name].close()
    hidden, answer, digest, revoked = capsys.readouterr().out.splitlines()
    assert hidden == "redact 2 values hidden"
    assert "back pain" in answer
    assert len(digest) == 64
    assert revoked.startswith("('")


def test_what_was_built_on_a_segment_goes_with_it(agent: Any) -> None:
    intake, billing = agent("intake"), agent("billing")
    first = intake.publish(NOTE, "billing", secrets=[NAME, SSN])
    second = billing.publish("Seen today.", "archive", secrets=[], consume=[first])
    gone = intake.revoke(first, cascade=True).revoked
    assert set(gone) == {first.handle, second.handle}


def test_refusals_are_openais_errors_with_the_reason(agent: Any) -> None:
    with pytest.raises(BadRequestError, match=r"publish\.forbid"):
        agent("intake").publish(NOTE, "billing", secrets=[], forbid=["nonsense"])
    with pytest.raises(BadRequestError, match="not in the prompt"):
        agent("intake").publish(NOTE, "billing", secrets=["Bob Short"])


def test_both_kinds_have_the_same_methods() -> None:
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        other = getattr(AsyncClient, name.replace("__e", "__ae"))
        assert inspect.signature(method) == inspect.signature(other)
        assert inspect.iscoroutinefunction(other) is (name != "__init__")


def test_another_server_publishes_nothing(engine: Running) -> None:
    """vLLM itself knows no such field; an answer without the proxy's word is no publish."""
    with Client(f"{engine.url}/v1", engine.api_key) as client:
        with pytest.raises(ValueError, match="is base_url that of an LCGuard proxy"):
            client.publish(NOTE, "billing", secrets=[])
