"""Guarded handoffs through a real vLLM engine on the CPU: right, isolated, failing closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.grants import new_handle
from lcguard.records import mask_of
from lcguard.rule import Rule
from lcguard.segment import segments_to_cache
from tests.engine import Engine, logprobs, make_engine, needs_vllm, question, records, tokens
from tests.fixtures import forbid_all
from tests.vllm.handoffs import consume, hf_segment, publish, stored

pytestmark = [
    needs_vllm,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
]
MADE = {"n_tokens", "draw", "tensor_digests", "created_at", "handle", "expires_at_s", "hmac"}
"""Fields of a manifest that are another segment's own."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from make_engine(tmp_path_factory.mktemp("engine"))


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
