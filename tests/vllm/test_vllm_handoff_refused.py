"""What a handoff through vLLM keeps apart and refuses; graphs of agents, and a promotion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lcguard.agents.backends.base import Turn
from lcguard.agents.backends.hf_agents import HFAgents
from lcguard.agents.backends.vllm_agents import VLLMAgents
from lcguard.agents.orchestrator import run
from lcguard.agents.scenarios.generator import GeneratorConfig
from lcguard.agents.scenarios.graph import make_graph_scenario
from lcguard.agents.topology import Link, Topology
from lcguard.guards.frozen import GuardError
from lcguard.guards.registry import Registry
from lcguard.guards.registry_file import REGISTRY_FILE
from lcguard.handoff.errors import HandoffError
from lcguard.handoff.grants import make_grant, new_handle
from lcguard.manifest import Manifest
from lcguard.segment import KVSegment
from tests.docs.blocks import block
from tests.engine import Engine, logprobs, make_engine, needs_vllm, question, records, tokens
from tests.vllm.handoffs import SECRET, consume, publish, stored

pytestmark = [
    needs_vllm,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from make_engine(tmp_path_factory.mktemp("engine"))


# -- isolated


def test_nobody_else_meets_guarded_blocks(engine: Engine) -> None:
    record, other = records(engine.agent, 2, seed=83)
    length = min(len(record.ids), len(other.ids)) // 32 * 32
    # an answer that stands early in the one record: with the other's KV it is another
    early = {s.field for s in record.spans if s.end < length}
    ask = list(next(q for q in record.questions if q.kind == "direct" and q.field in early).prompt)
    one, two = (publish(engine, r.ids[:length], "identity") for r in (record, other))
    (mine,) = engine.run([ask], [consume(one)])
    assert mine.num_cached_tokens >= length
    placeholders = [engine.agent.source.pad_id] * length + ask
    connector = engine.connector.scheduler
    plan = connector._salt(type("P", (), {"consume": (), "agent": "", "publish": None})(), "")
    (plain, salted, sibling) = engine.llm.engine.generate(
        [
            {"prompt_token_ids": placeholders},
            {"prompt_token_ids": placeholders, "cache_salt": one.handle},
            {"prompt_token_ids": placeholders, "cache_salt": plan},
        ],
        use_tqdm=False,
    )
    for output in (plain, salted, sibling):
        assert output.num_cached_tokens == 0
    (theirs, again) = engine.run([ask, ask], [consume(two), consume(one)])
    assert tokens(theirs) != tokens(mine)
    assert tokens(again) == tokens(mine)
    torch.testing.assert_close(logprobs(again), logprobs(mine), atol=1e-5, rtol=1e-5)


def test_a_salt_sets_apart_and_changes_no_answer(engine: Engine) -> None:
    """A request's salt names no block of another's; what it computes is right all the same."""
    (record,) = records(engine.agent, 1, seed=84)
    handle = publish(engine, record.ids, "identity")
    ask = list(question(record).prompt)
    (first,) = engine.run([ask], [consume(handle)])
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        logprobs=1,
        extra_args={"kv_transfer_params": {"lcguard": consume(handle)}},
    )
    (salted,) = engine.llm.engine.generate(
        [{"prompt_token_ids": ask, "cache_salt": "mine"}], params, use_tqdm=False
    )
    assert tokens(salted) == tokens(first)


# -- refused


def refusals(engine: Engine) -> dict[str, tuple[int, str, Any]]:
    """name -> status, part of the message, and the handoff."""
    (record,) = records(engine.agent, 1, seed=85)
    good = publish(engine, record.ids[:64], "identity")
    unknown, late = new_handle(), int(time.time()) + 100

    def one(handle: str, grant: str) -> dict[str, Any]:
        return {"consume": {"agent": "identity", "segments": [{"handle": handle, "grant": grant}]}}

    def grant(handle: str, expires_at_s: int) -> str:
        return make_grant(SECRET, handle, "identity", expires_at_s)

    edge = {"source": "a", "audience": "gate"}
    foreign = stored(engine, good)
    other = new_handle()
    manifest = foreign.manifest.model_copy(update={"handle": other, "revision": "another"})
    engine.worker.store.put(KVSegment(foreign.keys, foreign.values, manifest).sign(SECRET))
    return {
        "no grant": (
            400,
            "grant",
            {"consume": {"agent": "identity", "segments": [{"handle": good.handle}]}},
        ),
        "forged grant": (403, "does not let agent", one(good.handle, f"{late}.{'0' * 64}")),
        "malformed grant": (403, "malformed", one(good.handle, "yes please")),
        "foreign agent": (403, "does not let agent 'mallory'", consume(good, agent="mallory")),
        "expired grant": (403, "expired", one(good.handle, grant(good.handle, 5))),
        "missing": (404, "does not exist", one(unknown, grant(unknown, late))),
        "other model": (400, "revision", one(other, grant(other, late))),
        "no placeholders": (400, "placeholder", consume(good, placed=True)),
        "unknown key": (400, "colour", {**consume(good), "colour": 1}),
        "empty": (400, "give publish or consume", {}),
        "unknown guard": (400, "gate", {"publish": edge | {"spans": []}}),
        "unknown category": (400, "forbid", {"publish": edge | {"forbid": ["age"]}}),
    }


def test_every_refusal_names_its_reason_and_the_engine_lives(engine: Engine) -> None:
    from vllm.exceptions import GracefulHTTPError

    (record,) = records(engine.agent, 1, seed=86)
    ask = [*record.ids, *question(record).prompt]
    (before,) = engine.run([ask])
    kept = sorted(engine.worker.store.handles())
    for name, (status, message, handoff) in refusals(engine).items():
        with pytest.raises(GracefulHTTPError, match=message) as caught:
            engine.run([ask], [handoff])
        assert int(caught.value.http_status) == status, name
    with pytest.raises(GracefulHTTPError, match="log-probabilities"):
        engine.run([ask], [consume(publish(engine, ask, "identity"))], prompt_logprobs=1)
    (after,) = engine.run([ask])
    assert tokens(after) == tokens(before)
    new = set(engine.worker.store.handles()) - set(kept)
    assert len(new) == 3  # the two published here, and the one of another model


def test_the_engine_itself_fails_closed_without_the_front_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same refusals in the scheduler: the request ends in an error, its neighbour does not."""
    monkeypatch.setattr("lcguard.vllm.frontend.FrontEnd.admit", lambda self, h, prompt, p: prompt)
    (record,) = records(engine.agent, 1, seed=87)
    ask = [*record.ids, *question(record).prompt]
    (alone,) = engine.run([ask])
    for name, (_, _, handoff) in refusals(engine).items():
        if name in ("unknown key", "empty", "no grant", "unknown category"):
            continue  # refused while parsing, before the front end
        bad, neighbour = engine.run([ask, ask], [handoff, None])
        assert tokens(neighbour) == tokens(alone), name
        assert bad.outputs[0].finish_reason == "error", name
        assert tokens(bad) == [], name


def test_a_damaged_segment_ends_its_request_alone(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=88)
    ask = list(question(record).prompt)
    whole = [*record.ids, *ask]
    handle = publish(engine, record.ids, "identity")
    (file,) = (engine.store / handle.handle).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    bad, neighbour = engine.run([ask, whole], [consume(handle), None])
    assert bad.outputs[0].finish_reason == "error"
    (alone,) = engine.run([whole])
    assert tokens(neighbour) == tokens(alone)
    with pytest.raises(HandoffError, match="could not be loaded"):
        engine.llm.generate(agent="identity", prompt=ask, consume=[handle])


def test_a_failing_guard_stores_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = records(engine.agent, 1, seed=89)
    before = sorted(engine.worker.store.handles())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise GuardError("it broke")

    monkeypatch.setitem(engine.worker.guards, "broken", fail)
    with pytest.raises(HandoffError, match="was not stored"):
        publish(engine, record.ids, "broken")
    assert sorted(engine.worker.store.handles()) == before
    assert not list(engine.store.glob(".*/*"))  # nothing half-written either


def test_a_request_can_tighten_but_not_loosen(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=90)
    connector = engine.connector.scheduler.gatekeeper
    edge = connector.policy.edges[0]
    loose = edge.model_copy(update={"forbid": ("health",), "derive": ("health",)})
    policy = connector.policy.model_copy(update={"edges": (loose,)})
    before, connector._policy = connector._policy, policy
    try:
        plain = publish(engine, record.ids, "identity")
        tight = publish(engine, record.ids, "identity", policy=["person"], ttl_s=9e6)
    finally:
        connector._policy = before
    assert plain.forbid == ("health",)
    assert tight.forbid == ("person", "health")
    assert tight.expires_at_s <= time.time() + edge.ttl_s + 1


def test_a_stored_segment_names_everything_but_the_text(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=91)
    segment = stored(engine, publish(engine, record.ids, "gate"))
    manifest: Manifest = segment.manifest
    assert manifest.audience == "gate"
    assert manifest.source_agent == "intake"
    assert manifest.model_id == "model"
    text = engine.agent.decode(record.ids)
    for secret in record.secrets():
        assert engine.agent.decode(secret.ids).strip() in text
        assert engine.agent.decode(secret.ids).strip() not in manifest.encode().decode()


def test_the_wrappers_ten_lines_run(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcguard.vllm.llm import GuardedLLM

    code = block("docs/vllm.md", "GuardedLLM.build(")
    monkeypatch.setattr(GuardedLLM, "build", lambda *args, **options: engine.llm)
    exec(compile(code, "docs/vllm.md", "exec"), {"__name__": "__main__"})
    complaint, number = capsys.readouterr().out.splitlines()
    assert "back pain" in complaint
    assert "912-55-1029" not in number


# -- orchestrated


def test_a_graph_of_agents_runs_alike_on_both_backends(engine: Engine) -> None:
    """Two workers at once, a manager who merges, and on: vLLM against transformers."""
    topology = Topology(
        "team",
        ("w1", "w2", "identity", "gate"),
        (Link("w1", "identity"), Link("w2", "identity"), Link("identity", "gate")),
    )
    config = GeneratorConfig(5, "test", 3, 4, 1, 0.0)
    scenarios = [make_graph_scenario(config, i, topology) for i in range(4)]
    ours = VLLMAgents(engine.llm, engine.worker.store, SECRET, engine.agent.decode)
    there = run(ours, topology, scenarios, engine.agent.encoder)
    guards = {"identity->gate": engine.worker.guards["gate"], "*": engine.worker.guards["identity"]}
    here = run(HFAgents(engine.agent, "guarded", guards), topology, scenarios, engine.agent.encoder)
    for link in ("w1->identity", "w2->identity"):
        pairs = zip(there.received[link].references, here.received[link].references, strict=True)
        for one, two in pairs:
            torch.testing.assert_close(one.kv().keys, two.kv().keys, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(one.kv().values, two.kv().values, atol=1e-3, rtol=1e-3)
    # behind both workers' segments, and guarded with another draw of the noise
    one, two = (t.received["identity->gate"].references[0].kv() for t in (there, here))
    assert one.keys.shape == two.keys.shape
    apart = (one.values - two.values).square().mean() / two.values.square().mean()
    assert 1e-6 < float(apart) < 0.2
    asked = [[a.right for a in t.answered if a.link != "identity->gate"] for t in (there, here)]
    assert asked[0] == asked[1]
    assert sum(asked[0]) / len(asked[0]) > 0.8
    assert {s.key for r in there.received.values() for s in r.references} <= set(
        engine.worker.store.handles()
    )
    with pytest.raises(ValueError, match="was not published through vLLM"):
        ours.publish(
            [
                Turn(
                    "s",
                    "identity",
                    here.received["w1->identity"].references[:1],
                    there.received["identity->gate"].records[:1],
                )
            ]
        )


# -- live


def test_what_is_promoted_guards_without_a_restart(engine: Engine) -> None:
    """And what is not as it was signed does not: the guard in force stays."""
    followed, live = engine.worker.live._followed[0], engine.worker.live
    followed.file._every_s = 0.0
    kept = Registry(followed.folder, SECRET)
    v1, v2 = kept.state.versions
    chosen = iter(records(engine.agent, 400, seed=501))

    def publishes() -> str:
        segment = stored(engine, publish(engine, next(chosen).ids, "live"))
        return segment.manifest.guard_digest

    assert publishes() == v1.digest
    before = (kept.folder / REGISTRY_FILE).read_bytes()
    kept.promote("v2", "better")
    found = [publishes()]
    while found[-1] == v1.digest:  # until it is read, beside the steps
        found.append(publishes())
    assert found[-1] == v2.digest
    assert engine.worker.guards["live"].digest == v2.digest
    after = (kept.folder / REGISTRY_FILE).read_bytes()
    for data, why in ((before, "an older copy was put back"), (after[:-9], "put back a copy")):
        (kept.folder / REGISTRY_FILE).write_bytes(data)
        assert publishes() == v2.digest
        assert why in followed.complaint
    (kept.folder / REGISTRY_FILE).write_bytes(after)
    assert kept.rollback("it leaks").name == "v1"
    while publishes() == v2.digest:
        pass
    assert engine.worker.guards["live"].digest == v1.digest
    assert (followed.complaint, live._guards is engine.worker.guards) == ("", True)
