"""Packed questions give the logits of the same question asked alone, as plain text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lcguard.categories import CATEGORIES
from lcguard.records import (
    IGNORE,
    TokenQuestion,
    TokenRecord,
    TokenSpan,
    additive,
    mask_of,
    masks,
    pack_questions,
    pad,
)
from lcguard.rule import Rule
from lcguard.source import ModelSource
from tests.fixtures import tiny_model


def question(prompt: tuple[int, ...], answer: tuple[int, ...], **changes: Any) -> TokenQuestion:
    options: dict[str, Any] = {"field": "f", "category": None, "kind": "direct", "task": True}
    return TokenQuestion(prompt, answer, **(options | changes))


def record(name: str, ids: tuple[int, ...], *questions: TokenQuestion) -> TokenRecord:
    spans = (
        TokenSpan(1, 3, "ssn", "government_id", secret=True),
        TokenSpan(3, 4, "city", None, secret=True),
        TokenSpan(4, 5, "phone", "contact", secret=False),
    )
    return TokenRecord(name, "s", "a->b", "t", "v", ids, spans, questions, Rule(("government_id",)))


RECORDS = [
    record(
        "a",
        (5, 6, 7, 8, 9, 10, 11),
        question((20, 21), (30, 31, 1)),
        question((22, 23, 24), (32, 1)),
        question((25,), (1,)),
    ),
    record("b", (12, 13, 14, 15, 16), question((26, 27, 28, 29), (33, 34, 35, 1))),
    record("c", (17, 18, 19, 40, 41, 42)),
]


def test_pad() -> None:
    assert pad([[1, 2], [3]], -1).tolist() == [[1, 2], [3, -1]]
    assert pad([], 0).shape == (0, 0)
    assert pad([[], []], 0).shape == (2, 0)


def test_secrets_are_what_the_edge_forbids() -> None:
    (secret,) = RECORDS[0].secrets()
    assert (secret.category, secret.field, secret.ids, secret.positions) == (
        "government_id",
        "ssn",
        (6, 7),
        (1, 3),
    )


def test_masks_name_categories() -> None:
    other = replace(RECORDS[1], rule=Rule(("finance", "health"), ("finance",)))
    mask = masks([RECORDS[0], other])
    for row, names in zip(mask.forbid, (("government_id",), ("finance", "health")), strict=True):
        assert {c for c, on in zip(CATEGORIES, row, strict=True) if on} == set(names)
    vector = mask.vector()
    assert vector.shape == (2, 2 * len(CATEGORIES))
    assert vector.sum(1).tolist() == [1.0, 3.0]
    # deriving what is not forbidden changes nothing
    loose = mask_of([Rule(("health",), ("finance",))])
    assert torch.equal(loose.vector(), mask_of([Rule(("health",))]).vector())
    assert mask_of([]).forbid.shape == (0, len(CATEGORIES))


def test_labels_follow_their_tokens() -> None:
    packed = pack_questions(RECORDS)
    row = [tuple(t[0].tolist()) for t in (packed.ids, packed.block, packed.step, packed.labels)]
    n = IGNORE
    assert row == [
        (20, 21, 30, 31, 22, 23, 24, 32, 25),
        (0, 0, 0, 0, 1, 1, 1, 1, 2),
        (0, 1, 2, 3, 0, 1, 2, 3, 0),
        (n, 30, 31, 1, n, n, 32, 1, 1),
    ]
    assert (packed.block[2] == -1).all()
    assert (packed.labels[2] == IGNORE).all()
    assert (packed.labels != IGNORE).sum().item() == 3 + 2 + 1 + 4


def test_only_wanted_questions_are_packed() -> None:
    packed = pack_questions(RECORDS, lambda r, q: r.record_id == "a" and len(q.prompt) == 3)
    assert packed.ids.tolist() == [[22, 23, 24, 32], [0] * 4, [0] * 4]
    assert pack_questions(RECORDS, lambda r, q: False).ids.shape == (3, 0)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(tiny_model("qwen3"))


def test_packed_questions_equal_plain_text(source: ModelSource) -> None:
    """Each question alone after its context, no packing, no KV, no padding."""
    kv = source.prefill([r.ids for r in RECORDS])
    logits = source.answer_logits(kv, pack_questions(RECORDS))
    wanted = []
    for r in RECORDS:
        for q in r.questions:
            text = torch.tensor([(*r.ids, *q.prompt, *q.answer[:-1])])
            with torch.no_grad():
                wanted.append(source.model(text).logits[0, -len(q.answer) :])
    torch.testing.assert_close(logits, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_questions_do_not_see_each_other(source: ModelSource) -> None:
    """Changing one question leaves the others' logits alone; changing the context does not."""
    kv = source.prefill([RECORDS[0].ids])
    first, second, third = RECORDS[0].questions
    before = source.answer_logits(kv, pack_questions(RECORDS[:1]))
    changed = replace(RECORDS[0], questions=(first, question((60, 61, 62), (63, 1)), third))
    after = source.answer_logits(kv, pack_questions([changed]))
    torch.testing.assert_close(before[[0, 1, 2, 5]], after[[0, 1, 2, 5]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[3:5], after[3:5], atol=1e-2)
    other = source.prefill([(50, *RECORDS[0].ids[1:])])
    assert not torch.allclose(
        before, source.answer_logits(other, pack_questions(RECORDS[:1])), atol=1e-2
    )
    assert second.prompt not in [q.prompt for q in changed.questions]


def test_mask_is_never_empty() -> None:
    """A row that sees nothing has no softmax: padding sees itself."""
    packed = pack_questions(RECORDS)
    mask = packed.mask(torch.zeros(3, 4, dtype=torch.bool))
    assert mask.shape == (3, 1, 9, 13)
    assert mask.any(-1).all()
    assert not mask[..., :4].any()
    bias = additive(mask, torch.float32)
    assert torch.equal(bias == 0, mask)
    assert torch.isfinite(bias).all()
