"""The proxy before a real vLLM: handoffs, streams, tenants, revocation, roles."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from lcguard.commands.live_servers import Running
from tests.engine import needs_vllm
from tests.server.proxy import (
    ASK_COMPLAINT,
    ASK_SSN,
    BLOCK_TOKENS,
    COMPLAINT,
    NAME,
    SSN,
    Front,
    error,
    wait_for,
)

pytest_plugins = ("tests.server.proxy_fixtures",)
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
LONG = "Read the record with care and say only what it says, no more and no less. " * 5
"""Several blocks of the prefix cache."""


def cached_tokens(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def figure(engine: Running, name: str) -> float:
    """One of vLLM's metrics."""
    text = engine.get("/metrics", timeout_s=60)[1].decode()
    (found,) = re.findall(rf"^vllm:{name}\{{.*\}} ([0-9.e+]+)$", text, re.M)
    return float(found)


def prefix_hits(engine: Running) -> float:
    """Tokens that vLLM found in its prefix cache so far."""
    return figure(engine, "prefix_cache_hits_total")


def chunks(data: bytes) -> list[Any]:
    """The events of a stream; the last must be its end."""
    events = [e.removeprefix(b"data: ") for e in data.split(b"\n\n") if e]
    assert events.pop() == b"[DONE]"
    return [json.loads(e) for e in events]


def joined(events: list[Any]) -> dict[str, Any]:
    """A stream as one: under load vLLM puts several tokens into one event, or not."""
    choices = [c for e in events for c in e["choices"]]
    deltas = [c.get("delta", c) for c in choices]
    logprobs = [c["logprobs"] for c in choices if c.get("logprobs")]
    return {
        "keys": {k for e in events for k in e} | {k for c in choices for k in c},
        "text": "".join(d.get("text") or d.get("content") or "" for d in deltas),
        "role": [d["role"] for d in deltas if d.get("role")],
        "logprobs": {k: [y for x in logprobs for y in x.get(k) or []] for x in logprobs for k in x},
        "finish": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "usage": [e["usage"] for e in events if e.get("usage")],
    }


def unnamed(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in ("id", "created")}


def test_one_publishes_another_consumes_and_a_third_is_refused(front: Front) -> None:
    answer = front.publish(front.auth("intake"), "billing")
    made = answer.json()["lcguard"]["published"]
    assert answer.headers["x-lcguard-handle"] == made["handle"]
    assert (made["source"], made["audience"], made["guard"]) == ("intake", "billing", "gate")
    got = front.ask(front.auth("billing"), ASK_COMPLAINT, made["handle"])
    assert COMPLAINT in got.json()["choices"][0]["message"]["content"]
    assert [s["handle"] for s in got.json()["lcguard"]["consumed"]] == [made["handle"]]
    assert got.headers["x-lcguard-consumed"] == made["handle"]
    other = front.ask(front.auth("scheduling"), ASK_COMPLAINT, made["handle"])
    assert error(other) == (403, "not_audience")
    assert other.headers["x-lcguard-verdict"] == "blocked"
    never = front.ask(front.auth("billing"), ASK_COMPLAINT, "x" * 32)
    assert error(never) == (404, "no_segment")


def test_headers_stand_for_the_field(front: Front) -> None:
    body = {"model": "nano", "prompt": f"SSN: {SSN}.", "max_tokens": 1}
    publish = front.auth("intake") | {"X-LCGuard-Publish": "open"}
    made = front.http.post("/v1/completions", json=body, headers=publish)
    handle = made.headers["x-lcguard-handle"]
    ask = {"model": "nano", "messages": [{"role": "user", "content": ASK_SSN}], "temperature": 0}
    consume = front.auth("open") | {"X-LCGuard-Consume": handle}
    answer = front.http.post("/v1/chat/completions", json=ask, headers=consume)
    assert SSN in answer.json()["choices"][0]["message"]["content"]
    both = front.http.post(
        "/v1/chat/completions", json=ask | {"lcguard": {"consume": [handle]}}, headers=consume
    )
    assert error(both) == (400, "bad_handoff")


def test_one_request_consumes_and_publishes(front: Front) -> None:
    first = front.handle(front.auth("intake"), "open", f"SSN: {SSN}.")
    both = {"consume": [first], "publish": {"audience": "clerk"}}
    made = front.chat(
        front.auth("open"),
        "",
        both,
        max_tokens=1,
        add_generation_prompt=False,
        messages=[{"role": "system", "content": f"Patient {NAME}. Chief complaint: {COMPLAINT}."}],
    ).json()["lcguard"]
    assert made["consumed"][0]["handle"] == first
    second = made["published"]["handle"]
    clerk = front.auth("clerk")
    assert COMPLAINT in front.answer(clerk, ASK_COMPLAINT, second)
    # what was consumed is not published again
    assert SSN not in front.answer(clerk, ASK_SSN, second)
    path = f"/lcguard/v1/segments/{second}"
    assert front.http.get(path, headers=front.auth("open")).json()["parents"] == [first]
    assert "parents" not in front.http.get(path, headers=clerk).json()


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_carries_the_handle_in_the_chunk_that_ends_it(front: Front, path: str) -> None:
    text = f"Chief complaint: {COMPLAINT}."
    own = (
        {"messages": [{"role": "system", "content": text}], "add_generation_prompt": False}
        if path.startswith("chat")
        else {"prompt": text}
    )
    body = {"model": "nano", "max_tokens": 3, "stream": True} | own
    publish = body | {"lcguard": {"publish": {"audience": "open"}}}
    answer = front.http.post(f"/v1/{path}", json=publish, headers=front.auth("intake"))
    *others, last = chunks(answer.content)
    assert all("lcguard" not in c and "kv_transfer_params" not in c for c in others)
    assert last["choices"][0]["finish_reason"]
    assert all(c["choices"] and c["id"] == last["id"] for c in others)
    assert answer.headers["x-lcguard-handle"] == last["lcguard"]["published"]["handle"]
    handle = last["lcguard"]["published"]["handle"]
    assert COMPLAINT in front.answer(front.auth("open"), ASK_COMPLAINT, handle)
    consume = body | {"lcguard": {"consume": [handle]}}
    answer = front.http.post(f"/v1/{path}", json=consume, headers=front.auth("open"))
    assert chunks(answer.content)[-1]["lcguard"]["consumed"][0]["handle"] == handle


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_handoff_the_answer_is_vllms_own(
    front: Front, engine: Running, path: str, stream: bool
) -> None:
    own = (
        {"messages": [{"role": "user", "content": "What is it?"}], "logprobs": True}
        if path.startswith("chat")
        else {"prompt": "The name is", "logprobs": 2, "echo": True}
    )
    body = {"model": "nano", "max_tokens": 8, "temperature": 0, "seed": 5} | own
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    direct = httpx.post(
        f"{engine.url}/v1/{path}",
        json=body,
        headers={"Authorization": f"Bearer {engine.api_key}"},
        timeout=60,
    )
    proxied = front.http.post(f"/v1/{path}", json=body, headers=front.auth("intake"))
    assert direct.status_code == proxied.status_code == 200
    assert direct.headers["content-type"] == proxied.headers["content-type"]
    if stream:
        wanted, got = chunks(direct.content), chunks(proxied.content)
        assert joined(got) == joined(wanted)
    else:
        assert unnamed(proxied.json()) == unnamed(direct.json())


def test_an_error_of_vllm_is_passed_as_it_is(front: Front, engine: Running) -> None:
    body = {"model": "nano", "prompt": "a", "max_tokens": 4, "min_tokens": 5}
    direct = httpx.post(
        f"{engine.url}/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {engine.api_key}"},
    )
    proxied = front.http.post("/v1/completions", json=body, headers=front.auth("intake"))
    assert proxied.status_code == direct.status_code == 400
    assert proxied.json() == direct.json()


def test_pieces_of_a_stream_come_as_they_are_generated(front: Front, engine: Running) -> None:
    """Told from what vLLM still has to generate once the first pieces have come: a proxy that kept
    them until the end would leave nothing."""
    n, answers = 900, 8
    body = {
        "model": "nano",
        "prompt": "Once",
        "max_tokens": n,
        "n": answers,
        "temperature": 1,
        "ignore_eos": True,
        "stream": True,
    }
    intake = front.auth("intake")
    before = figure(engine, "generation_tokens_total")
    with front.http.stream("POST", "/v1/completions", json=body, headers=intake) as answer:
        assert answer.status_code == 200, answer.read()
        came = b""
        for piece in answer.iter_raw():
            came += piece
            if came.count(b"data: {") >= 4 * answers:
                break
        so_far = figure(engine, "generation_tokens_total") - before
        assert so_far < n * answers, "all was generated before the first pieces came"
    assert b"[DONE]" not in came
    assert b'"finish_reason":"' not in came

    # who has left is generated for no longer: no later count reaches the whole either
    def idle() -> bool:
        front.complete(intake, "a", max_tokens=1)  # vLLM counts anew with each step
        return figure(engine, "num_requests_running") == 0

    wait_for(idle, 120)
    assert figure(engine, "generation_tokens_total") - before < n * answers


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temprature": 0}, "temprature"),
        ({"kv_transfer_params": {"lcguard": {}}}, "kv_transfer_params"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"lcguard": {"publish": {"audience": "open", "raw": True}}}, "lcguard.publish.raw"),
        ({"lcguard": {"publish": {"audience": "a/b"}}}, "lcguard.publish.audience"),
        ({"lcguard": {"publish": {"audience": "open", "source": "x"}}}, "lcguard.publish.source"),
        ({"lcguard": {}}, "lcguard"),
        ({"lcguard": {"consume": ["x" * 32]}, "logprobs": True}, "logprobs"),
    ],
)
def test_what_is_not_in_the_contract_is_refused_by_name(
    front: Front, body: dict[str, Any], param: str
) -> None:
    answer = front.chat(front.auth("intake"), "hello", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_contract_is_served_to_whoever_has_a_key(front: Front) -> None:
    fields = front.http.get("/lcguard/v1/contract", headers=front.auth("intake")).json()
    request = fields["endpoints"]["chat"]["request"]
    assert request["messages"]["class"] == "guarded"
    assert request["cache_salt"]["class"] == "dropped"
    for header in ({}, {"Authorization": "Bearer lcg_" + "a" * 12 + "_" + "b" * 43}):
        answer = front.http.get("/lcguard/v1/contract", headers=header)
        assert error(answer) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_agents_do_not_share_the_prefix_cache_and_choose_no_salt(front: Front) -> None:
    """Neither another tenant's agents nor the neighbours, whom the threat model is about."""
    ours = front.auth("intake")
    assert cached_tokens(front.chat(ours, LONG, cache_salt="shared")) == 0
    for other in (front.auth("intake", "acme"), front.auth("billing")):
        assert cached_tokens(front.chat(other, LONG, cache_salt="shared")) == 0
    assert cached_tokens(front.chat(ours, LONG, cache_salt="another")) >= BLOCK_TOKENS


def test_a_published_prompts_blocks_are_its_senders(front: Front) -> None:
    """Its raw KV stands in the engine's prefix cache as well: nobody else's request meets it."""
    note = "The case of the day is the matter of a lost and found set of keys and papers. " * 5
    intake, other = front.auth("intake"), front.auth("auditing")
    admin = front.auth("root", role="admin")

    def send(who: dict[str, str], handoff: Any = None) -> int:
        return cached_tokens(front.complete(who, note, lcguard=handoff))

    assert send(intake, {"publish": {"audience": "open"}}) == 0
    assert send(other) == send(admin) == 0
    assert send(other, {"publish": {"audience": "open"}}) == 0
    assert send(intake, {"publish": {"audience": "open"}}) >= BLOCK_TOKENS


def test_tenants_are_apart_from_end_to_end(front: Front) -> None:
    acme = {a: front.auth(a, "acme") for a in ("intake", "partner")}
    ours = {a: front.auth(a) for a in ("intake", "partner")}
    made = front.publish(acme["intake"], "partner").json()["lcguard"]["published"]
    handle = made["handle"]
    assert made["guard"] == "identity"  # tenant acme's own rule
    assert SSN in front.answer(acme["partner"], ASK_SSN, handle)
    assert front.publish(ours["intake"], "partner").json()["lcguard"]["published"]["guard"] == (
        "gate"
    )
    for name in ("intake", "partner"):
        assert error(front.ask(ours[name], ASK_SSN, handle))[0] in (403, 404)
        listed = front.http.get("/lcguard/v1/segments", headers=ours[name]).json()["data"]
        assert handle not in {s["handle"] for s in listed}
        path = f"/lcguard/v1/segments/{handle}"
        assert error(front.http.get(path, headers=ours[name])) == (404, "no_segment")
        assert error(front.http.delete(path, headers=ours[name])) == (404, "no_segment")
        listed = front.http.get("/lcguard/v1/segments", headers=acme[name]).json()["data"]
        assert handle in {s["handle"] for s in listed}
    assert SSN in front.answer(acme["partner"], ASK_SSN, handle)


def test_a_revoked_segment_is_gone_whatever_the_prefix_cache_holds(
    front: Front, engine: Running
) -> None:
    intake, reader = front.auth("intake"), front.auth("open")
    handle = front.handle(intake, "open")
    assert front.ask(reader, LONG + ASK_SSN, handle).status_code == 200
    before = prefix_hits(engine)
    again = front.ask(reader, LONG + ASK_SSN, handle)
    # the second finds blocks behind the segment, which the first had to compute
    assert prefix_hits(engine) >= before + BLOCK_TOKENS
    # and its reader is not told: what was found is as long as what was consumed
    assert "prompt_tokens_details" not in again.json()["usage"]
    gone = front.http.delete(f"/lcguard/v1/segments/{handle}", headers=intake)
    assert gone.json() == {"revoked": [handle], "ended_requests": 0, "still_in_store": []}
    assert error(front.ask(reader, LONG + ASK_SSN, handle)) == (404, "no_segment")
    listed = front.http.get("/lcguard/v1/segments", headers=reader).json()["data"]
    assert handle not in {s["handle"] for s in listed}
    twice = front.http.delete(f"/lcguard/v1/segments/{handle}", headers=intake)
    assert error(twice) == (404, "no_segment")


@pytest.mark.parametrize("cascade", [False, True])
def test_a_cascade_revokes_what_was_published_on_top(front: Front, cascade: bool) -> None:
    intake, middle, last = (front.auth(a) for a in ("intake", "open", "clerk"))
    first = front.handle(intake, "open")
    second = front.chat(
        middle,
        "",
        {"consume": [first], "publish": {"audience": "clerk"}},
        max_tokens=1,
        messages=[{"role": "system", "content": "Desk: 4."}],
        add_generation_prompt=False,
    ).json()["lcguard"]["published"]["handle"]
    path = f"/lcguard/v1/segments/{first}"
    gone = front.http.delete(path, headers=intake, params={"cascade": cascade}).json()["revoked"]
    assert set(gone) == ({first, second} if cascade else {first})
    assert front.ask(last, "Which desk?", second).status_code == (404 if cascade else 200)


def test_an_expired_segment_is_gone(front: Front) -> None:
    reader = front.auth("open")
    handle = front.handle(front.auth("intake"), "open", ttl_s=3)
    gone = wait_for(lambda: (r := front.ask(reader, ASK_SSN, handle)).status_code != 200 and r)
    assert gone.status_code == 404  # of the proxy, or of vLLM where it expired on its way there
