"""Guard twin inside vLLM: a prompt is looked at once and published without what was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lcguard.guards.passage import Passage
from lcguard.vllm.scanned_prefixes import KEPT_S, LEAST_TOKENS, PrefixCopies
from tests.engine import Engine, make_engine, needs_vllm, question, records, tokens
from tests.fixtures import forbid_all
from tests.vllm.handoffs import consume, hf_segment, publish, stored

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from make_engine(tmp_path_factory.mktemp("engine"))


def found_in(engine: Engine, ids: Any) -> list[int]:
    """The prompt's tokens as guard twin leaves them, by the way over transformers."""
    guard = engine.worker.guards["twin"]
    (marks,) = guard.marks(hf_segment(engine, ids), forbid_all(1))
    neutral = engine.agent.special.neutral_id
    return [neutral if mark >= 0 else i for i, mark in zip(ids, marks.tolist(), strict=True)]


def assert_is_twin(engine: Engine, handle: Any, twin: list[int]) -> None:
    segment, wanted = stored(engine, handle), hf_segment(engine, twin)
    torch.testing.assert_close(segment.keys, wanted.keys[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(segment.values, wanted.values[0], atol=1e-4, rtol=1e-4)


def test_twin_looks_for_secrets_itself_and_stores_the_prompt_without_them(engine: Engine) -> None:
    """One call of the user's: the segment is that of the prompt with all that the detector finds
    in it replaced, as over transformers, and several at once do not mix."""
    chosen = records(engine.agent, 3, seed=84)
    asked = [{"agent": "intake", "prompt": list(r.ids), "audience": "twin"} for r in chosen]
    handles = engine.llm.publish_all(asked)
    for record, handle in zip(chosen, handles, strict=True):
        twin = found_in(engine, record.ids)
        assert twin != list(record.ids)
        assert_is_twin(engine, handle, twin)
        assert stored(engine, handle).manifest.guard_digest == engine.worker.guards["twin"].digest
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


def late(engine: Engine) -> tuple[int, list[int], list[int]]:
    """Of a prompt whose first value stands late: the first token that guard twin replaces, the
    prompt, and what is left of it."""
    found = []
    for record in records(engine.agent, 40, seed=86):
        twin = found_in(engine, record.ids)
        pairs = enumerate(zip(record.ids, twin, strict=True))
        found.append((next(i for i, (a, b) in pairs if a != b), list(record.ids), twin))
    mark, ids, twin = max(found)
    assert mark >= LEAST_TOKENS
    return mark, ids, twin


def test_the_second_pass_begins_at_the_first_mark(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[tuple[int, ...]] = []
    scans: set[str] = set()
    original = PrefixCopies.place

    def place(self: PrefixCopies, handle: str, blocks: list[int], *where: int) -> None:
        scans.add(handle)
        placed.append((*where, self._copies[handle][0].shape[2]))
        original(self, handle, blocks, *where)

    monkeypatch.setattr(PrefixCopies, "place", place)
    mark, ids, twin = late(engine)
    handle = publish(engine, ids, "twin")
    assert placed == [(0, 0, mark, mark)]  # nothing of what is hidden is in the copy
    assert_is_twin(engine, handle, twin)
    # behind what it consumes an agent's own tokens are looked at, from the first of them on

    def marks(self: Passage) -> torch.Tensor:
        return torch.where(torch.arange(self._tokens.n_tokens) == 40, 0, -1)[None]

    monkeypatch.setattr(Passage, "marks", marks)
    n, placed[:] = handle.n_tokens, []
    after = engine.llm.publish(agent="twin", prompt=ids, audience="twin-too", consume=[handle])
    assert placed == [(n, n, n + 40, 40)]
    got = engine.run([ids[:5]], [consume(after)], max_tokens=2)
    assert "error" not in got[0].kv_transfer_params["lcguard"]
    # what was asked for went with one of the steps since
    assert len(scans) == 2
    assert not engine.worker.prefixes._copies.keys() & scans


def test_what_nobody_asks_for_goes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves between the passes."""
    _, ids, _ = late(engine)
    raw = {"publish": {"source": "intake", "audience": "twin"}}
    engine.run([ids], [raw], max_tokens=1)
    assert engine.worker.prefixes._copies
    prefixes = engine.connector.scheduler.prefixes
    until = prefixes._clock() + KEPT_S
    monkeypatch.setattr(prefixes, "_clock", lambda: until)
    engine.run([ids[:3]], max_tokens=1)
    assert not engine.worker.prefixes._copies
