"""Guarded handoffs through a real vLLM engine on the CPU: right, isolated, failing closed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

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
from lcguard.protocols import KVBatch
from lcguard.records import mask_of
from lcguard.rule import Rule
from lcguard.segment import KVSegment, segments_to_cache
from tests.docs.blocks import block
from tests.engine import KEY, Engine, logprobs, make_engine, needs_vllm, question, records, tokens
from tests.fixtures import forbid_all

pytestmark = [
    needs_vllm,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
]
SECRET = bytes.fromhex(KEY)
MADE = {"n_tokens", "draw", "tensor_digests", "created_at", "handle", "expires_at_s", "hmac"}
"""Fields of a manifest that are another segment's own."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from make_engine(tmp_path_factory.mktemp("engine"))


def publish(engine: Engine, ids: Any, audience: str, **more: Any) -> Any:
    return engine.llm.publish(agent="intake", prompt=list(ids), audience=audience, **more)


def consume(*handles: Any, agent: str = "", **more: Any) -> dict[str, Any]:
    segments = [{"handle": h.handle, "grant": h.grant} for h in handles]
    return {"consume": {"agent": agent or handles[0].audience, "segments": segments, **more}}


def stored(engine: Engine, handle: Any) -> KVSegment:
    return engine.worker.store.load(handle.handle, SECRET)  # type: ignore[no-any-return]


def hf_segment(engine: Engine, ids: Any) -> KVBatch:
    return engine.agent.source.prefill([tuple(ids)])


# -- right


def test_an_identity_handoff_answers_like_the_full_text(engine: Engine) -> None:
    """Any length, several consumers at once beside plain neighbours, prefix caching on."""
    chosen = records(engine.agent, 6)
    asks = [question(r).prompt for r in chosen]
    handles = [publish(engine, r.ids, "identity") for r in chosen]
    assert len({len(r.ids) % 32 for r in chosen}) > 3  # most end within a block
    whole = [[*r.ids, *ask] for r, ask in zip(chosen, asks, strict=True)]
    prompts = whole + [list(ask) for ask in asks] + whole
    handoffs = [None] * 6 + [consume(h) for h in handles] + [None] * 6
    out = engine.run(prompts, handoffs, max_tokens=32)
    for full, consumed, again in zip(out[:6], out[6:12], out[12:], strict=True):
        assert tokens(consumed) == tokens(full) == tokens(again)
        torch.testing.assert_close(logprobs(consumed), logprobs(full), atol=1e-4, rtol=1e-4)
    right = [
        tokens(o)[: len(question(r).answer)] == list(question(r).answer)
        for o, r in zip(out[6:12], chosen, strict=True)
    ]
    assert sum(right) >= 5  # the agent answers, it is not merely consistent
    placed = [engine.agent.source.pad_id] * handles[0].n_tokens + list(asks[0])
    assert handles[0].n_tokens == len(chosen[0].ids)
    (same,) = engine.run([placed], [consume(handles[0], placed=True)], max_tokens=32)
    assert tokens(same) == tokens(out[6])


@pytest.mark.parametrize("name", ["identity", "gaussian", "residual", "gate"])
def test_vllm_stores_the_segment_that_transformers_makes(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text, guard and noise through both backends: equal within float32 rounding, which
    may leave a mean near a tie on the next grid point."""
    secret = bytes(range(32))
    monkeypatch.setattr(engine.worker.saver.draws, "noise_key", lambda *_: secret)
    (record,) = records(engine.agent, 1, seed=78)
    segment = stored(engine, publish(engine, record.ids, name))
    guard = engine.worker.guards[name]
    raw = hf_segment(engine, record.ids)
    wanted = guard(raw, mask_of([Rule.of(record_forbid())]), keys=[secret]).kv
    assert segment.manifest.guard_digest == guard.digest
    if guard.module.config.noise:
        here, there = (guard.module.grid_points(kv, forbid_all(1)) for kv in (segment.kv(), wanted))
        apart = (here - there).abs()
        assert float(apart.max()) < 1.3
        assert float((apart > 0.5).double().mean()) < 0.1
    else:
        torch.testing.assert_close(segment.keys, wanted.keys[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(segment.values, wanted.values[0], atol=2e-3, rtol=2e-3)
    if name != "identity":
        assert not torch.allclose(segment.keys, raw.keys[0], atol=2e-2)
        assert not torch.allclose(segment.values, raw.values[0], atol=2e-2)


def test_equal_content_is_published_once(engine: Engine) -> None:
    """Whatever else the engine computes meanwhile; what grows keeps the rows that it had."""
    record, *others = records(engine.agent, 4, seed=93)
    first = stored(engine, publish(engine, record.ids, "gate"))
    handles = engine.llm.publish_all(
        [{"agent": "intake", "prompt": list(r.ids), "audience": "gate"} for r in (*others, record)]
    )
    again = stored(engine, handles[-1])
    assert first.manifest.handle != again.manifest.handle
    assert torch.equal(first.keys, again.keys)
    assert torch.equal(first.values, again.values)
    assert first.manifest.draw == again.manifest.draw != ""
    n, more = len(record.ids), list(others[0].ids[:9])
    grown = stored(engine, publish(engine, [*record.ids, *more], "gate"))
    assert torch.equal(first.keys, grown.keys[:, :, :n])
    assert grown.manifest.draw == first.manifest.draw
    # another start, another source, and another guard: draws of their own
    moved = stored(engine, publish(engine, [more[-1], *record.ids], "gate"))
    lab = engine.llm.publish(agent="lab", prompt=list(record.ids), audience="gate")
    blurred = stored(engine, publish(engine, record.ids, "gaussian"))
    draws = {s.manifest.draw for s in (first, moved, stored(engine, lab), blurred)}
    assert len(draws) == 4
    assert stored(engine, publish(engine, record.ids, "identity")).manifest.draw == ""


# -- several audiences


def test_one_publish_serves_several_audiences(engine: Engine) -> None:
    """One pass, one draw: the same bytes under the strictest rule, each under its own handle."""
    record, other = records(engine.agent, 2, seed=95)
    handles = publish(engine, record.ids, ["gate", "gate-too"])
    assert [h.audience for h in handles] == ["gate", "gate-too"]
    first, second = (stored(engine, h) for h in handles)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.values, second.values)
    assert first.manifest.draw == second.manifest.draw != ""
    assert first.manifest.lineage == second.manifest.lineage
    assert set(first.manifest.lineage.forbid) == set(record_forbid())
    # of the other nothing but what its rule took from both: neither in a field nor in the digest
    # of the rule that an audience is shown
    for segment, name in ((first, "gate"), (second, "gate-too")):
        manifest = segment.manifest
        alone = stored(engine, publish(engine, other.ids, name)).manifest
        assert (manifest.audience, manifest.edge) == (name, f"intake>{name}")
        assert manifest.policy_digest == alone.policy_digest
        own = MADE | {"lineage"}
        assert manifest.model_dump(exclude=own) == alone.model_dump(exclude=own)
    ask = list(question(record).prompt)
    one, two = engine.run([ask] * 2, [consume(h) for h in handles])
    assert tokens(one) == tokens(two)
    with pytest.raises(Exception, match="does not let agent 'gate-too' consume"):
        engine.run([ask], [consume(handles[0], agent="gate-too")])


def test_the_set_of_audiences_names_the_draw(engine: Engine) -> None:
    """Whoever gets one with others and one alone has two draws, and is counted so; of what the
    same set gets again, nothing is drawn anew, whoever of them is left."""
    (record,) = records(engine.agent, 1, seed=96)
    alone = stored(engine, publish(engine, record.ids, "gate"))
    one, two = publish(engine, record.ids, ["gate", "gate-too"])
    first = stored(engine, one)
    assert first.manifest.draw != alone.manifest.draw
    assert not torch.equal(first.keys, alone.keys)
    assert engine.worker.store.delete(one.handle)
    kept = stored(engine, two)  # revoking one takes nothing from the other
    again = [stored(engine, h) for h in publish(engine, record.ids, ("gate-too", "gate"))]
    for segment in again:
        assert torch.equal(segment.keys, kept.keys)
        assert segment.manifest.draw == kept.manifest.draw == first.manifest.draw


@pytest.mark.parametrize("name", ["twin", "redact"])
def test_what_is_hidden_before_the_guard_is_hidden_from_all(engine: Engine, name: str) -> None:
    """The strictest rule says what a detector looks for, and what is named is hidden from all."""
    (record,) = records(engine.agent, 1, seed=97)
    more = {"spans": [s.positions for s in record.secrets()]} if name == "redact" else {}
    alone = stored(engine, publish(engine, record.ids, name, **more))
    for names in ([name, f"{name}-too"], [f"{name}-too", name]):
        for handle in publish(engine, record.ids, names, **more):
            segment = stored(engine, handle)
            torch.testing.assert_close(segment.keys, alone.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(segment.values, alone.values, atol=1e-4, rtol=1e-4)


def test_where_one_cannot_be_stored_none_is(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=98)
    taken = publish(engine, record.ids, "gate-too")
    before = sorted(engine.worker.store.handles())
    for names, handles in (
        (("gate", "gate-too"), (new_handle(), taken.handle)),
        (("gate-too", "gate"), (taken.handle, new_handle())),
    ):
        raw = {
            "publish": {
                "source": "intake",
                "audience": names[0],
                "handle": handles[0],
                "also": [{"audience": names[1], "handle": handles[1]}],
            }
        }
        (out,) = engine.run([list(record.ids)], [raw], max_tokens=1)
        assert "error" in out.kv_transfer_params["lcguard"]
        assert sorted(engine.worker.store.handles()) == before  # what lay there lies there
    for names, why in ((["gate", "twin"], "publish to them apart"), ([], "at least one")):
        with pytest.raises(HandoffError, match=why):
            publish(engine, record.ids, names)
    assert sorted(engine.worker.store.handles()) == before


def record_forbid() -> tuple[str, ...]:
    from lcguard.categories import CATEGORIES

    return CATEGORIES


def test_redact_stores_the_twin(engine: Engine) -> None:
    (record,) = records(engine.agent, 1, seed=79)
    spans = [s.positions for s in record.secrets()]
    assert spans
    segment = stored(engine, publish(engine, record.ids, "redact", spans=spans))
    ids = list(record.ids)
    for start, end in spans:
        ids[start:end] = [engine.agent.special.neutral_id] * (end - start)
    twin = hf_segment(engine, ids)
    torch.testing.assert_close(segment.keys, twin.keys[0], atol=1e-4, rtol=1e-4)
    raw = hf_segment(engine, record.ids)
    assert not torch.allclose(segment.values, raw.values[0], atol=0.1)
    with pytest.raises(HandoffError, match="name secrets, or spans"):
        publish(engine, record.ids, "redact")
    with pytest.raises(HandoffError, match="not within the prompt"):
        publish(engine, record.ids, "redact", spans=[(5, 5000)])


def found_in(engine: Engine, ids: Any) -> list[int]:
    """The prompt's tokens as guard twin leaves them, by the way over transformers."""
    guard = engine.worker.guards["twin"]
    (marks,) = guard.marks(hf_segment(engine, ids), forbid_all(1))
    neutral = engine.agent.special.neutral_id
    return [neutral if mark >= 0 else i for i, mark in zip(ids, marks.tolist(), strict=True)]


def test_twin_looks_for_secrets_itself_and_stores_the_prompt_without_them(engine: Engine) -> None:
    """One call of the user's: the segment is that of the prompt with all that the detector finds
    in it replaced, as over transformers, and several at once do not mix."""
    chosen = records(engine.agent, 3, seed=84)
    asked = [{"agent": "intake", "prompt": list(r.ids), "audience": "twin"} for r in chosen]
    handles = engine.llm.publish_all(asked)
    for record, handle in zip(chosen, handles, strict=True):
        segment, twin = stored(engine, handle), found_in(engine, record.ids)
        assert twin != list(record.ids)
        wanted = hf_segment(engine, twin)
        torch.testing.assert_close(segment.keys, wanted.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(segment.values, wanted.values[0], atol=1e-4, rtol=1e-4)
        assert segment.manifest.guard_digest == engine.worker.guards["twin"].digest
    answers = engine.run(
        [list(question(r).prompt) for r in chosen], [consume(h) for h in handles], max_tokens=16
    )
    plain = engine.run(
        [[*found_in(engine, r.ids), *question(r).prompt] for r in chosen], max_tokens=16
    )
    assert [tokens(a) for a in answers] == [tokens(p) for p in plain]


def test_nothing_of_a_prompt_that_was_looked_at_stays(engine: Engine) -> None:
    """The first pass stores nothing and is found in no cache; its word fits one prompt alone."""
    first, second = records(engine.agent, 2, seed=85)
    before = set(engine.store.rglob("*.safetensors"))
    raw = {"publish": {"source": "intake", "audience": "twin"}}
    (looked,) = engine.run([list(first.ids)], [raw], max_tokens=1)
    answer = looked.kv_transfer_params["lcguard"]
    assert set(answer) == {"scanned"}
    assert set(engine.store.rglob("*.safetensors")) == before
    (again,) = engine.run([list(first.ids)], [raw], max_tokens=1)
    assert again.num_cached_tokens == 0
    scanned = answer["scanned"]
    assert scanned["spans"]
    for ids, changes in (
        (second.ids, {}),
        (first.ids, {"spans": scanned["spans"][1:]}),
        (first.ids, {"forbid": ["health"], "source": "lab"}),
        (first.ids, {"scan": "0" + scanned["scan"]}),
    ):
        wish = {"publish": {**raw["publish"], **scanned, **changes}}
        with pytest.raises(Exception, match=r"scan|not within"):
            engine.run([list(ids)], [wish], max_tokens=1)
    with pytest.raises(Exception, match="leave spans out"):
        engine.run([list(first.ids)], [{"publish": {**raw["publish"], "spans": [[1, 2]]}}])
    assert set(engine.store.rglob("*.safetensors")) == before


def test_where_nobody_wrote_an_edge_redact_asks_what_is_secret(engine: Engine) -> None:
    """By default nothing is stored on a guess; what is named is hidden in any spelling."""
    note = "The patient's name is {}. Chief complaint: back pain. Again, {}. SSN: {}."
    kept = sorted(engine.worker.store.handles())

    def made(name: str, number: str, **more: Any) -> Any:
        return engine.llm.publish(
            agent="intake",
            prompt=note.format(name, name.upper(), number),
            audience="billing",
            **more,
        )

    for more, why in (
        ({}, r"'redact' on intake -> billing .* name secrets.*\[\] for none.*another guard"),
        ({"secrets": ["Ada Lang"]}, r"secrets\[0\].* not in the prompt"),
        ({"secrets": [" "]}, "white space"),
        ({"secrets": [], "spans": []}, "give one"),
    ):
        with pytest.raises(HandoffError, match=why) as caught:
            made("Ada Long", "912-55-1029", **more)
        assert caught.value.status == 400
        assert "\n" not in str(caught.value)
    assert sorted(engine.worker.store.handles()) == kept
    one = made("Ada Long", "912-55-1029", secrets=["ada long", "912551029"])
    two = made("Ada Long", "348-16-7756", secrets=["Ada  LONG", "348 16 7756"])
    assert (one.guard, one.n_tokens) == ("redact", two.n_tokens)
    assert torch.equal(stored(engine, one).keys, stored(engine, two).keys)
    assert torch.equal(stored(engine, one).values, stored(engine, two).values)
    bare = made("Ada Long", "912-55-1029", secrets=[])  # the publisher's word: there are none
    assert not torch.equal(stored(engine, bare).values, stored(engine, one).values)


def test_the_gate_keeps_the_task_and_hides_the_rest(engine: Engine) -> None:
    chosen = records(engine.agent, 20, seed=80)
    task, secret = [0, 0], [0, 0]
    for record in chosen:
        handle = publish(engine, record.ids, "gate")
        for wanted, count in ((True, task), (False, secret)):
            q = next((q for q in record.questions if q.kind == "direct" and q.task == wanted), None)
            if q is None:
                continue
            (out,) = engine.run([list(q.prompt)], [consume(handle)], max_tokens=len(q.answer))
            count[0] += tokens(out) == list(q.answer)
            count[1] += 1
    assert task[0] >= 0.85 * task[1] > 10
    assert secret[0] <= 0.15 * secret[1]
    assert secret[1] > 10


def test_segments_stand_one_behind_the_other(engine: Engine) -> None:
    """Two segments at offsets give what transformers gives on the same two segments."""
    first, second = records(engine.agent, 2, seed=81)
    ask = list(question(second).prompt)
    a, b = (publish(engine, r.ids, "identity") for r in (first, second))
    (out,) = engine.run([ask], [consume(a, b)], max_tokens=6)
    config = engine.agent.source.config
    cache = segments_to_cache(
        [stored(engine, a), stored(engine, b)], config, suffix_tokens=len(ask) + 6
    )
    got = greedy(engine.agent.source.model, cache, ask, 6)
    assert tokens(out) == got
    (swapped,) = engine.run([ask], [consume(b, a)], max_tokens=6)
    assert not torch.allclose(logprobs(out), logprobs(swapped), atol=1e-4)


@torch.no_grad()
def greedy(model: Any, cache: DynamicCache, ids: list[int], n: int) -> list[int]:
    out: list[int] = []
    feed = torch.tensor([ids])
    for _ in range(n):
        logits = model(input_ids=feed, past_key_values=cache, use_cache=True).logits[0, -1]
        out.append(int(logits.argmax()))
        if out[-1] == model.config.eos_token_id:
            break
        feed = torch.tensor([[out[-1]]])
    return out


def test_a_chain_of_three_agents(engine: Engine) -> None:
    """B reads A's segment and publishes its own record on top; C reads both."""
    first, second = records(engine.agent, 2, seed=82)
    a = engine.llm.publish(agent="a", prompt=list(first.ids), audience="identity")
    b = engine.llm.publish(agent="identity", prompt=list(second.ids), audience="gate", consume=[a])
    assert stored(engine, b).manifest.hop == 1
    assert b.n_tokens == len(second.ids)
    q = question(second)
    answer = engine.llm.generate(agent="gate", prompt=list(q.prompt), consume=[b])
    assert answer.strip() == engine.agent.decode(q.answer[:-1]).strip()


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
