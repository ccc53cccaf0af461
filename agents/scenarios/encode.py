"""Scenarios to token ids, for any Hugging Face tokenizer.

The context is everything up to the end of the record's text; the receiver's part starts with
whatever the chat template puts between the first message's text and the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcguard.agents.scenarios.types import Hop
from lcguard.records import TokenQuestion, TokenRecord, TokenSpan

_TEXT, _QUESTION = "\u2460lcguard-text\u2460", "\u2461lcguard-question\u2461"


@dataclass(frozen=True)
class ChatFormat:
    """The three strings of a chat template around a text and a question about it."""

    before: str
    between: str
    after: str
    answer_prefix: str
    end_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Reads the format off the tokenizer's template.

        A template without system role gets text and question in one user message; a tokenizer
        without template gets a plain question-and-answer layout. Raises ``ValueError`` where the
        tokenizer has no end token.
        """
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no eos token; set tokenizer.eos_token"
            )
        rendered = _render(tokenizer)
        before, rest = rendered.split(_TEXT)
        between, after = rest.split(_QUESTION)
        prefix = "" if after[-1:].isspace() else " "
        return cls(before, between, after, prefix, int(tokenizer.eos_token_id))


def _render(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return f"{tokenizer.bos_token or ''}{_TEXT}\nQuestion: {_QUESTION}\nAnswer:"
    system = [{"role": "system", "content": _TEXT}, {"role": "user", "content": _QUESTION}]
    single = [{"role": "user", "content": f"{_TEXT}\n\n{_QUESTION}"}]
    try:
        text = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates refuse the role by raising their own error
        if "system" not in str(error).lower():
            raise
        text = tokenizer.apply_chat_template(single, tokenize=False, add_generation_prompt=True)
    return str(text)


class Encoder:
    """Encodes hops; keeps the tokenizer and its chat format."""

    def __init__(self, tokenizer: Any, request: str = "") -> None:
        """``request``: what every question ends with, such as how to answer."""
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} is slow: spans need character offsets; "
                "load it with use_fast=True"
            )
        self.tokenizer, self.request = tokenizer, request
        self.format = ChatFormat.of(tokenizer)
        self._ids: dict[str, tuple[int, ...]] = {}

    def asking(self, request: str) -> Encoder:
        """The same with another ending of every question."""
        return Encoder(self.tokenizer, request)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece, without special tokens of the tokenizer's own."""
        known = self._ids.get(text)
        if known is None:
            known = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(self._ids) < 200_000:
                self._ids[text] = known
        return known

    def prompt(self, question: str) -> tuple[int, ...]:
        """The receiver's tokens after a consumed segment, up to the answer."""
        return self.ids(self.format.between + question + self.request + self.format.after)

    def answer(self, text: str) -> tuple[int, ...]:
        """An answer's tokens with its end token."""
        return (*self.ids(self.format.answer_prefix + text), self.format.end_id)

    def context(self, text: str) -> tuple[int, ...]:
        """The sender's tokens."""
        return self.ids(self.format.before + text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Of each token of ``context(text)``, its characters ``[start, end)`` in the text;
        negative where it belongs to what the chat template writes in front."""
        before = self.format.before
        found = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        shift = len(before)
        return [(a - shift, b - shift) for a, b in found["offset_mapping"]]

    def encode(self, hops: Sequence[Hop]) -> list[TokenRecord]:
        """All hops as token records."""
        texts = [self.format.before + h.record.text for h in hops]
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            self._record(hop, ids, offsets)
            for hop, ids, offsets in zip(
                hops, batch["input_ids"], batch["offset_mapping"], strict=True
            )
        ]

    def _record(self, hop: Hop, ids: list[int], offsets: list[tuple[int, int]]) -> TokenRecord:
        shift = len(self.format.before)
        spans = []
        for span in hop.record.spans:
            low, high = span.start + shift, span.end + shift
            inside = [i for i, (a, b) in enumerate(offsets) if a < high and b > low]
            spans.append(
                TokenSpan(
                    inside[0],
                    inside[-1] + 1,
                    span.field,
                    span.category,
                    span.band,
                    hop.is_secret(span),
                )
            )
        questions = tuple(
            TokenQuestion(
                self.prompt(q.text),
                self.answer(q.answer),
                q.field,
                q.category,
                q.kind,
                hop.is_task(q),
            )
            for q in hop.record.questions
        )
        return TokenRecord(
            hop.record.record_id,
            hop.scenario_id,
            hop.edge_name,
            hop.record.record_type,
            hop.record.vertical,
            tuple(ids),
            tuple(spans),
            questions,
            hop.edge.rule,
        )
