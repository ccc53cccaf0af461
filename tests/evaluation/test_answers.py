"""Answers by what is said: whatever is exactly right is also said, and a sentence counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lcguard.agents.backends.hf import HFBackend, load_backend
from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.load import load_hops
from lcguard.evaluation.answers import said_right
from lcguard.evaluation.hop_segments import is_task
from lcguard.evaluation.plan import EvalConfig
from lcguard.protocols import KVBatch


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    return load_backend("nano")


def test_what_is_exactly_right_is_said(nano: HFBackend) -> None:
    records = nano.encoder.encode(load_hops("generator", seed=7, n=6))
    kv = nano.source.prefill([r.ids for r in records])
    exact = nano.source.exact_match(records, kv, is_task)
    said = said_right(nano.source, nano.decode, records, kv, is_task)
    assert [len(row) for row in said] == [len(row) for row in exact]
    pairs = [(e, s) for a, b in zip(exact, said, strict=True) for e, s in zip(a, b, strict=True)]
    assert sum(e for e, _ in pairs) > 0.9 * len(pairs)
    assert all(s for e, s in pairs if e)


class Speaking:
    """A receiver that says the right value in a sentence to every second question asked."""

    def __init__(self, words: dict[tuple[int, ...], str], encoder: Encoder) -> None:
        self.words, self.encoder, self.asked = words, encoder, 0

    def generate(
        self, kv: KVBatch, prompts: Sequence[tuple[int, ...]], *more: Any
    ) -> list[tuple[int, ...]]:
        out = []
        for prompt in prompts:
            self.asked += 1
            value = self.words[prompt] if self.asked % 2 else "nothing of the kind"
            out.append(self.encoder.ids(f"I think that it is {value}, as far as I know."))
        return out


def test_a_sentence_counts_and_rows_come_back_in_order(nano: HFBackend) -> None:
    (record, *_) = nano.encoder.encode(load_hops("generator", seed=8, n=1))
    asked = [q for q in record.questions if is_task(record, q)]
    words = {q.prompt: nano.decode(q.answer[:-1]).strip() for q in asked}
    kv = nano.source.prefill([record.ids])
    speaking: Any = Speaking(words, nano.encoder)
    (row,) = said_right(speaking, nano.decode, [record], kv, is_task)
    assert row == [i % 2 == 0 for i in range(len(asked))]


def test_chat_models_are_scored_by_replies_unless_told_otherwise() -> None:
    assert not EvalConfig().by_reply
    assert EvalConfig(model="smollm2").by_reply
    assert not EvalConfig(model="smollm2", scoring="exact").by_reply
    assert EvalConfig(scoring="said").by_reply


def test_questions_to_a_chat_model_end_with_how_to_answer(nano: HFBackend) -> None:
    asking = nano.encoder.asking(" Only the value.")
    assert nano.decode(asking.prompt("SSN?")) == nano.decode(nano.encoder.prompt("SSN?")).replace(
        "SSN?", "SSN? Only the value."
    )
