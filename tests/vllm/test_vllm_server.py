"""vLLM's own OpenAI server with the connector, as docs/vllm.md starts it, and the openai client."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.nano.load import model_path
from lcguard.handoff.grants import new_handle
from lcguard.handoff.keys import new_key
from lcguard.handoff.policy import parse_policy
from lcguard.store import open_store
from tests.docs.blocks import block
from tests.engine import KEY, fit_twin, needs_vllm, policy, question, records
from tests.vllm.api_server import Server, consume, documented_edges, environment

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
prompts = json.load(sys.stdin)
llm = LLM(sys.argv[1], dtype="float32", block_size=32, max_model_len=1024, enforce_eager=True)
out = llm.generate([{"prompt_token_ids": p} for p in prompts],
                   SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
print("TOKENS" + json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import openai

    folder = tmp_path_factory.mktemp("server")
    agent = load_backend("nano")
    fit_twin(agent).save_pretrained(folder / "twin")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "LCGuardConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "store": f"file://{folder / 'store'}",
            "policy": policy() | {"edges": [*policy()["edges"], *documented_edges()]},
            "guards": {"gate": "nano:gate", "twin": str(folder / "twin")},
        },
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model_path()),
        "--served-model-name",
        "nano",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--block-size",
        "32",
        "--max-model-len",
        "1024",
        "--enforce-eager",
        "--kv-transfer-config",
        json.dumps(transfer),
        "--trust-request-chat-template",
    ]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    try:
        deadline = time.monotonic() + 420
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((folder / "log").read_text()[-4000:])
                time.sleep(0.5)
        yield Server(client, str(client.base_url), folder / "store", agent, process)
    finally:
        client.close()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def test_publish_and_consume_with_the_openai_client(server: Server) -> None:
    (record,) = records(server.agent, 1, seed=301)
    q = question(record)
    whole = server.ask([*record.ids, *q.prompt])
    made = server.publish(record.ids, "identity")
    assert made["n_tokens"] == len(record.ids)
    by_tokens = server.ask(list(q.prompt), consume(made))
    text = server.agent.decode(q.prompt)
    by_text = server.ask(text, consume(made))
    assert by_tokens.choices[0].text == by_text.choices[0].text == whole.choices[0].text
    assert by_tokens.choices[0].text.strip() == server.agent.decode(q.answer[:-1]).strip()
    # its audience is told the length no closer than the edge's bucket
    shown = parse_policy(policy()).for_edge("intake", "identity").shown_tokens(len(record.ids))
    assert shown > len(record.ids)
    assert by_tokens.kv_transfer_params["lcguard"] == {"consumed_tokens": shown}
    streamed = server.ask(list(q.prompt), consume(made), stream=True)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == whole.choices[0].text


def test_a_publish_whose_guard_looks_for_secrets_is_one_request(server: Server) -> None:
    """Read, and computed again without what was found: the client asks once, streaming or not."""
    (record,) = records(server.agent, 1, seed=302)
    made = server.publish(record.ids, "twin")
    assert made["guard"] == "twin"
    assert made["n_tokens"] == len(record.ids)
    store = open_store(f"file://{server.store}")
    segment = store.load(made["handle"], bytes.fromhex(KEY))
    raw = server.agent.source.prefill([record.ids])
    first = min(s.start for s in record.spans if s.secret)
    torch.testing.assert_close(
        segment.values[:, :, :1], raw.values[0, :, :, :1], atol=2e-3, rtol=2e-3
    )
    assert not torch.allclose(segment.values[:, :, first], raw.values[0, :, :, first], atol=0.02)
    handoff = {"publish": {"source": "intake", "audience": "twin"}}
    pieces = list(server.ask(list(record.ids), handoff, stream=True))
    assert len(pieces) > 1


@pytest.mark.parametrize("name", ["gate", "twin"])
@pytest.mark.parametrize("named", [False, True])
def test_one_request_publishes_for_several(server: Server, name: str, named: bool) -> None:
    """Each under a handle of its own, drawn by the engine or named by who asks."""
    import openai

    (record,) = records(server.agent, 1, seed=303)
    names, handles = [name, f"{name}-too"], [new_handle(), new_handle()]
    each = [
        {"audience": n} | ({"handle": h} if named else {})
        for n, h in zip(names, handles, strict=True)
    ]
    handoff = {"publish": {"source": "intake", **each[0], "also": each[1:]}}
    # a stop string ends the answer here, before the engine says that it has stored
    more = {"stop": [" "], "max_tokens": 12} if named else {}
    answer = server.ask(list(record.ids), handoff, **more).kv_transfer_params["lcguard"]
    made = [answer, *answer["also"]]
    assert [m["audience"] for m in made] == names
    assert not named or [m["handle"] for m in made] == handles
    store = open_store(f"file://{server.store}")
    first, second = (store.load(m["handle"], bytes.fromhex(KEY)) for m in made)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.values, second.values)
    ask = list(question(record).prompt)
    one, two = (server.ask(ask, consume(m)).choices[0].text for m in made)
    assert one == two
    with pytest.raises(openai.PermissionDeniedError):
        server.ask(ask, consume(made[0], agent=names[1]))


def test_a_chat_request_consumes(server: Server) -> None:
    """The chat template needs no change: the segment stands before whatever it renders."""
    text = "Employee record. The name is Quella Brandt. Job title: Analyst\nSSN: 941-22-7310."
    ids = [*server.agent.encoder.context(text), server.agent.special.end_id]

    def answers(audience: str) -> list[str]:
        made, said = server.publish(ids, audience), []
        for ask in ("What is the job title?", "What is the SSN?"):
            out = server.client.chat.completions.create(
                model="nano",
                max_tokens=16,
                temperature=0,
                messages=[{"role": "user", "content": ask}],
                extra_body={"kv_transfer_params": {"lcguard": consume(made)}},
            )
            said.append(out.choices[0].message.content)
        return said

    job, number = answers("identity")
    assert "Analyst" in job
    assert "941-22-7310" in number
    # every publication draws its own noise, and the gate costs an answer now and then
    drawn = [answers("gate") for _ in range(8)]
    assert sum("Analyst" in job for job, _ in drawn) >= 3
    assert not any("941-22-7310" in number for _, number in drawn)


KIND = (  # nano's own template behind a system turn of its own, as SmolLM2's has
    "{% if messages[0].role != 'system' %}<|system|>You are kind and never say a title.<|end|>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_templates_default_turn_does_not_stand_behind_a_segment(server: Server) -> None:
    text = "Employee record. The name is Quella Brandt. Job title: Analyst\nSSN: 941-22-7310."
    ids = [*server.agent.encoder.context(text), server.agent.special.end_id]
    made = server.publish(ids, "identity")
    ask = [{"role": "user", "content": "What is the job title?"}]

    def chat(handoff: Any = None, **more: Any) -> Any:
        more |= {"kv_transfer_params": {"lcguard": handoff}} if handoff else {}
        return server.client.chat.completions.create(
            model="nano", max_tokens=16, temperature=0, messages=ask, extra_body=more
        )

    def n_tokens(**more: Any) -> int:
        return int(chat(**more).usage.prompt_tokens)

    n_own = n_tokens()
    assert n_tokens(chat_template=KIND) > n_own
    plain, kind = chat(consume(made)), chat(consume(made), chat_template=KIND)
    assert plain.usage.prompt_tokens == kind.usage.prompt_tokens == len(ids) + n_own
    assert plain.choices[0].message.content == kind.choices[0].message.content
    assert "Analyst" in kind.choices[0].message.content
    # whoever counts tokens for such a request gets those that it will have
    address = server.url.removesuffix("/v1/") + "/tokenize"
    body = {"model": "nano", "messages": ask, "chat_template": KIND}
    counted = [
        httpx.post(address, json=body | more, timeout=60).json()["count"]
        for more in ({}, {"kv_transfer_params": {"lcguard": consume(made)}})
    ]
    assert counted == [n_tokens(chat_template=KIND), n_own]


def test_refusals_have_a_status_and_a_reason(server: Server) -> None:
    import openai

    (record,) = records(server.agent, 1, seed=302)
    ask = list(question(record).prompt)
    made = server.publish(record.ids, "identity")
    gone = server.publish(record.ids, "identity")
    store = open_store(f"file://{server.store}")
    store.delete(gone["handle"])
    forged = made["grant"][:-1] + ("1" if made["grant"].endswith("0") else "0")
    cases: list[tuple[int, str, Any, dict[str, Any]]] = [
        (403, "mallory", consume(made, agent="mallory"), {}),
        (403, "does not let", consume(made | {"grant": forged}), {}),
        (404, "does not exist", consume(gone), {}),
        (
            400,
            "none but consumed tokens",
            {"consume": consume(made)["consume"] | {"placed": True}},
            {},
        ),
        (400, "log-probabilities", consume(made), {"echo": True, "logprobs": 1}),
        (
            400,
            "n=1",
            {"publish": {"source": "a", "audience": "identity"}},
            {"n": 2, "temperature": 1},
        ),
        (400, "Extra inputs", {"publish": {"source": "a", "audience": "b", "raw": True}}, {}),
        (400, "give publish or consume", {}, {}),
        (400, "add it to guards", {"publish": {"source": "a", "audience": "residual"}}, {}),
    ]
    for status, message, handoff, more in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            server.ask(ask, handoff, **more)
        assert caught.value.status_code == status, message
        assert message in str(caught.value), (message, str(caught.value))
    assert server.ask(ask).choices[0].text is not None


def test_without_parameters_it_is_plain_vllm(server: Server) -> None:
    chosen = records(server.agent, 8, seed=303)
    prompts = [[*r.ids, *question(r).prompt] for r in chosen]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model_path())],
        input=json.dumps(prompts).encode(),
        capture_output=True,
        env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=True,
    )
    line = next(x for x in done.stdout.decode().splitlines() if x.startswith("TOKENS"))
    plain = json.loads(line.removeprefix("TOKENS"))
    for prompt, wanted in zip(prompts, plain, strict=True):
        answer = server.client.completions.create(
            model="nano",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert list(answer.choices[0].token_ids) == wanted


def test_two_hundred_mixed_requests(server: Server) -> None:
    """Concurrency 16: no engine death, no wrong neighbour, nothing raw on the disk."""
    import openai

    chosen = records(server.agent, 8, seed=304)
    asks = [list(question(r).prompt) for r in chosen]
    wholes = [[*r.ids, *a] for r, a in zip(chosen, asks, strict=True)]
    wanted = [server.ask(w).choices[0].text for w in wholes]
    plain = [server.ask(a).choices[0].text for a in asks]
    handles = [server.publish(r.ids, "identity") for r in chosen]
    stale = dict(handles[0], grant="1." + "0" * 64)

    def one(i: int) -> str:
        j = i % 8
        kind = ("publish", "consume", "plain", "whole", "malformed")[i % 5]
        try:
            if kind == "publish":
                return "ok" if server.publish(chosen[j].ids, "gate")["handle"] else "no handle"
            if kind == "malformed":
                bad = (consume(stale), {"consume": {"agent": "x"}}, {"publish": []}, "text")
                server.ask(asks[j], bad[(i // 5) % 4])
                return "a malformed request passed"
            handoff = consume(handles[j]) if kind == "consume" else None
            text = server.ask(wholes[j] if kind == "whole" else asks[j], handoff).choices[0].text
            return "ok" if text == (plain if kind == "plain" else wanted)[j] else f"wrong: {kind}"
        except openai.APIStatusError as error:
            expected = kind == "malformed" and error.status_code in (400, 403)
            return "ok" if expected else f"{kind}: {error}"

    order = list(range(200))
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(one, order))
    assert [o for o in outcomes if o != "ok"] == []
    assert server.process.poll() is None
    raws = [server.agent.source.prefill([r.ids]) for r in chosen]
    store = open_store(f"file://{server.store}")
    guarded = 0
    for handle in store.handles():
        segment = store.load(handle, bytes.fromhex(KEY))
        if segment.manifest.audience != "gate":
            continue
        guarded += 1
        for raw in raws:
            if raw.keys.shape[3] == segment.keys.shape[2]:
                assert not torch.allclose(segment.keys, raw.keys[0], atol=0.02)
    assert guarded >= 40


def test_a_server_with_another_key_cannot_read_these_segments(server: Server) -> None:
    from lcguard.manifest import SegmentError

    store = open_store(f"file://{server.store}")
    with pytest.raises(SegmentError, match="key"):
        store.load(store.handles()[0], bytes.fromhex(new_key()))


def test_the_documented_client_runs_word_for_word(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("docs/vllm.md", "OpenAI(base_url=")
    address = server.url.removeprefix("http://").split("/")[0]
    assert "127.0.0.1:8000" in code
    names: dict[str, Any] = {}
    exec(compile(code.replace("127.0.0.1:8000", address), "docs/vllm.md", "exec"), names)
    names["client"].close()
    assert "back pain" in capsys.readouterr().out
