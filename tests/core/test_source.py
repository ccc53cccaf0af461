"""Asking about a segment gives what asking about the text gives, for every supported family."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lcguard.protocols import KVBatch
from lcguard.records import TokenQuestion, TokenRecord, pack_questions
from lcguard.rope import UnsupportedModelError
from lcguard.rule import Rule
from lcguard.source import ModelSource
from tests.fixtures import KINDS, VOCAB, tiny_model

END = 1
CONTEXTS = ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14), (15, 16, 17, 18, 19))
PROMPTS = ((20, 21, 22), (23,), (24, 25))
NEW = 6


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> ModelSource:
    return ModelSource(tiny_model(request.param))


def greedy(source: ModelSource, text: Sequence[int]) -> tuple[int, ...]:
    """transformers' own greedy decoding of one text, without the end token."""
    ids = torch.tensor([text])
    out = source.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=END,
        pad_token_id=0,
    )[0, len(text) :].tolist()
    return tuple(out[: out.index(END)] if END in out else out)


def record(context: Sequence[int], *questions: tuple[Sequence[int], Sequence[int]]) -> TokenRecord:
    asked = tuple(
        TokenQuestion(tuple(p), tuple(a), "f", None, "direct", True) for p, a in questions
    )
    return TokenRecord("r", "s", "a->b", "t", "v", tuple(context), (), asked, Rule())


def test_prefill_in_a_padded_batch_equals_alone(source: ModelSource) -> None:
    kv = source.prefill(CONTEXTS)
    assert kv.keys.shape == (3, *source.shape[:2], 7, source.shape[2])
    assert kv.valid.sum(1).tolist() == [7, 3, 5]
    for i, context in enumerate(CONTEXTS):
        alone, n = source.prefill([context]), len(context)
        for one, many in ((alone.keys, kv.keys), (alone.values, kv.values)):
            torch.testing.assert_close(one[0], many[i, :, :, :n], atol=1e-5, rtol=1e-4)
            assert not many[i, :, :, n:].any()
            assert one.std() > 0.01
    split = source.prefill(CONTEXTS, batch=1)
    torch.testing.assert_close(split.keys, kv.keys, atol=1e-5, rtol=1e-4)


def test_answer_logits_equal_the_models(source: ModelSource) -> None:
    """With everything a family puts on its logits: caps, scales."""
    records = [record(c, (p, (30, 31, END))) for c, p in zip(CONTEXTS, PROMPTS, strict=True)]
    logits = source.answer_logits(source.prefill(CONTEXTS), pack_questions(records))
    wanted = []
    for context, prompt in zip(CONTEXTS, PROMPTS, strict=True):
        with torch.no_grad():
            wanted.append(source.model(torch.tensor([(*context, *prompt, 30, 31)])).logits[0, -3:])
    torch.testing.assert_close(logits, torch.cat(wanted), atol=1e-4, rtol=1e-4)
    assert torch.cat(wanted).std() > 0.05  # not all alike


def test_generate_equals_transformers(source: ModelSource) -> None:
    """A batch of unequal contexts and prompts against one text at a time."""
    answers = source.generate(source.prefill(CONTEXTS), PROMPTS, NEW, END)
    wanted = [greedy(source, (*c, *p)) for c, p in zip(CONTEXTS, PROMPTS, strict=True)]
    assert answers == wanted
    assert len(set(wanted)) == 3  # the context matters


def test_exact_match_is_what_greedy_decoding_gives(source: ModelSource) -> None:
    """Answers from real decoding, and the same with one token changed somewhere."""
    kv = source.prefill(CONTEXTS)
    answers = source.generate(kv, PROMPTS, NEW, END)
    records, wanted = [], []
    for context, prompt, answer in zip(CONTEXTS, PROMPTS, answers, strict=True):
        # not ended by itself within the budget: the answer is a prefix, without an end to match
        spoken = answer if len(answer) == NEW else (*answer, END)
        candidates = [spoken]
        candidates += [
            (*spoken[:i], (spoken[i] + 1) % VOCAB, *spoken[i + 1 :]) for i in range(len(spoken))
        ]
        records.append(record(context, *((prompt, c) for c in candidates)))
        wanted.append([True] + [False] * len(spoken))
    assert source.exact_match(records, kv, batch=2) == wanted
    # a question filter, and records that have none left
    none = source.exact_match(records, kv, lambda r, q: r.ids == CONTEXTS[0])
    assert none == [wanted[0], [], []]
    assert source.exact_match(records, kv, lambda r, q: False) == [[], [], []]


def test_generate_keeps_to_the_allowed_tokens(source: ModelSource) -> None:
    kv = source.prefill(CONTEXTS)
    allowed = torch.zeros(3, VOCAB, dtype=torch.bool)
    allowed[0, 50:53] = True
    allowed[1, 60] = True
    allowed[2] = True
    answers = source.generate(kv, PROMPTS, NEW, END, allowed)
    assert set(answers[0]) <= {50, 51, 52}
    assert set(answers[1]) <= {60}
    assert any(answers[:2])
    assert answers[2] == source.generate(kv, PROMPTS, NEW, END)[2]


def test_end_token_ends_an_answer() -> None:
    source = ModelSource(tiny_model("qwen3"))
    kv = source.prefill(CONTEXTS)
    free = source.generate(kv, PROMPTS, NEW, END)
    third = free[0][2]  # whatever it says third, call it the end
    stopped = source.generate(kv, PROMPTS, NEW, third)
    for short, long in zip(stopped, free, strict=True):
        wanted = long[: long.index(third)] if third in long else long
        assert short == wanted
    assert len(stopped[0]) < len(free[0])


def test_logits_are_differentiable_in_the_segment() -> None:
    source = ModelSource(tiny_model("qwen3"))
    kv = source.prefill(CONTEXTS)
    keys, values = kv.keys.clone().requires_grad_(), kv.values.clone().requires_grad_()
    records = [record(c, (p, (30, END))) for c, p in zip(CONTEXTS, PROMPTS, strict=True)]
    logits = source.answer_logits(KVBatch(keys, values, kv.valid), pack_questions(records))
    logits.square().sum().backward()
    for grad in (keys.grad, values.grad):
        assert grad is not None
        per_token = grad.abs().sum((1, 2, 4))
        assert bool((per_token > 0).equal(kv.valid))  # every token counts, padding never
    assert not any(p.requires_grad for p in source.model.parameters())


@pytest.mark.parametrize("how", ["logits", "generate"])
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_too_small_for_segment_and_question_is_refused(kind: str, how: str) -> None:
    """Beyond the window the model would see less than its text shows it, or more."""
    n = len(CONTEXTS[0])
    asked = pack_questions([record(CONTEXTS[0], (PROMPTS[0], (30, 31, END)))])

    def ask(window: int) -> object:
        source = ModelSource(tiny_model(kind, sliding_window=window))
        kv = source.prefill(CONTEXTS[:1])
        if how == "logits":
            return source.answer_logits(kv, asked)
        return source.generate(kv, PROMPTS[:1], 2, END)

    assert ask(n + 5) is not None
    with pytest.raises(UnsupportedModelError, match=f"{n} segment . 5 suffix tokens"):
        ask(n + 4)


def test_unsupported_models_are_refused_at_once() -> None:
    model = tiny_model("llama")
    model.config.model_type = "made_up"
    with pytest.raises(UnsupportedModelError, match="'made_up' was not proved"):
        ModelSource(model)
