"""Scenarios as token ids: spans, prompts and answers agree with the tokenizer's own template."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from lcguard.agents.nano.tokenizer import train_tokenizer
from lcguard.agents.scenarios.encode import ChatFormat, Encoder
from lcguard.agents.scenarios.load import load_hops
from lcguard.agents.scenarios.types import Hop

HOPS = load_hops("generator", split="test", n=12)
NEWLINE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + NEWLINE
)
BROKEN = "{{ raise_exception('no more tokens today') }}"


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(600, 300)


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def conversation(hop: Hop, question: str, answer: str, *, system: bool) -> list[dict[str, str]]:
    text = hop.record.text
    asked = (
        [{"role": "system", "content": text}, {"role": "user", "content": question}]
        if system
        else [{"role": "user", "content": f"{text}\n\n{question}"}]
    )
    return [*asked, {"role": "assistant", "content": answer}]


def test_token_spans_decode_to_the_values(trained: Any) -> None:
    records = Encoder(trained).encode(HOPS)
    assert len(records) == len(HOPS)
    for hop, record in zip(HOPS, records, strict=True):
        assert record.record_id == hop.record.record_id
        assert record.rule == hop.edge.rule
        for span, tokens in zip(hop.record.spans, record.spans, strict=True):
            text = trained.decode(record.ids[tokens.start : tokens.end])
            assert text.strip() == span.value
            assert (tokens.field, tokens.category, tokens.band) == (
                span.field,
                span.category,
                span.band,
            )
            assert tokens.secret == hop.is_secret(span)
        assert [q.task for q in record.questions] == [hop.is_task(q) for q in hop.record.questions]
        assert [s.ids for s in record.secrets()] == [
            record.ids[s.start : s.end] for s in record.spans if s.secret
        ]


def test_every_digit_is_a_token(trained: Any) -> None:
    digits = {trained.convert_ids_to_tokens(i): i for i in range(len(trained))}
    assert all(d in digits for d in "0123456789")
    encoder = Encoder(trained)
    assert list(encoder.ids("90210")) == [digits[d] for d in "90210"]
    mixed = [t for t in digits if len(t) > 1 and any(c.isdigit() for c in t)]
    assert mixed == []


@pytest.mark.parametrize(
    ("template", "system"),
    [(None, True), (NEWLINE, True), (NO_SYSTEM, False)],
    ids=["nano", "trailing newline", "no system role"],
)
def test_parts_join_to_the_whole_conversation(
    trained: Any, template: str | None, system: bool
) -> None:
    """Sender's ids + receiver's ids + answer's ids == the template's ids of it all."""
    tokenizer = with_template(trained, template) if template else trained
    encoder = Encoder(tokenizer)
    for hop in HOPS[:6]:
        for q in hop.record.questions:
            chat = conversation(hop, q.text, q.answer, system=system)
            whole = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
            expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
            parts = (
                encoder.context(hop.record.text) + encoder.prompt(q.text) + encoder.answer(q.answer)
            )
            assert list(parts) == expected


def test_prompt_is_what_the_template_generates_from(trained: Any) -> None:
    hop = HOPS[0]
    question = hop.record.questions[0].text
    encoder = Encoder(trained)
    chat = conversation(hop, question, "", system=True)[:-1]
    expected = trained.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(encoder.context(hop.record.text) + encoder.prompt(question)) == expected


def test_chat_format_without_template(trained: Any) -> None:
    form = ChatFormat.of(with_template(trained, None))
    assert (form.before, form.between, form.after) == ("", "\nQuestion: ", "\nAnswer:")
    assert form.answer_prefix == " "
    assert form.end_id == trained.eos_token_id


def test_chat_format_without_system_role(trained: Any) -> None:
    form = ChatFormat.of(with_template(trained, NO_SYSTEM))
    assert (form.before, form.between) == ("<|user|>\n", "\n\n")
    assert form.after == "<|end|>\n<|assistant|>\n"


def test_chat_format_with_trailing_newline(trained: Any) -> None:
    form = ChatFormat.of(with_template(trained, NEWLINE))
    assert form.after.endswith("<|assistant|>\n")
    assert form.answer_prefix == ""  # a space after the newline would be a token of its own


def test_a_template_that_fails_otherwise_is_not_hidden(trained: Any) -> None:
    with pytest.raises(Exception, match="no more tokens today"):
        ChatFormat.of(with_template(trained, BROKEN))


def test_refuses_slow_tokenizers_and_those_without_end() -> None:
    slow = SimpleNamespace(is_fast=False, name_or_path="old")
    with pytest.raises(ValueError, match=r"tokenizer 'old' is slow.*use_fast=True"):
        Encoder(slow)
    endless = SimpleNamespace(is_fast=True, name_or_path="new", eos_token_id=None)
    with pytest.raises(ValueError, match="'new' has no eos token; set tokenizer"):
        Encoder(endless)


def test_nothing_encodes_to_nothing(trained: Any) -> None:
    assert Encoder(trained).encode([]) == []
