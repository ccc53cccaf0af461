"""Records as an agent's model reads them: token ids, with the values and questions among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lcguard.categories import CATEGORIES, Category
from lcguard.rule import Rule


@dataclass(frozen=True)
class Secret:
    """A value that the edge's policy forbids, as the attacker is scored on it."""

    category: str
    field: str
    ids: tuple[int, ...]
    """Token ids of the value."""
    positions: tuple[int, int]
    """Token range ``[start, end)`` of the value in the sender's context."""


@dataclass(frozen=True)
class TokenSpan:
    start: int
    """First token of the value in the context."""
    end: int
    field: str
    category: str | None
    band: str | None = None
    secret: bool = False
    """True where the edge's policy forbids this value."""


@dataclass(frozen=True)
class TokenQuestion:
    prompt: tuple[int, ...]
    """Tokens after the context, up to where the answer starts."""
    answer: tuple[int, ...]
    """Answer with its end token."""
    field: str
    category: str | None
    kind: str
    task: bool
    """True where the receiver needs the answer for its task."""


@dataclass(frozen=True)
class TokenRecord:
    """One record crossing one edge: the sender's context, the token ranges of its values, and the
    questions that the receiver is asked after the context."""

    record_id: str
    scenario_id: str
    edge: str
    record_type: str
    vertical: str
    ids: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    questions: tuple[TokenQuestion, ...]
    rule: Rule
    """Of the edge."""

    @property
    def forbid(self) -> tuple[Category, ...]:
        return self.rule.forbid

    @property
    def derive(self) -> tuple[Category, ...]:
        return self.rule.derive

    def categorised(self) -> Iterator[tuple[TokenSpan, int]]:
        """The values that have a category, each with its place in ``CATEGORIES``."""
        for span in self.spans:
            if span.category is not None:
                yield span, CATEGORIES.index(span.category)

    def secrets(self) -> list[Secret]:
        """The values that the edge forbids."""
        return [
            Secret(s.category, s.field, self.ids[s.start : s.end], (s.start, s.end))
            for s in self.spans
            if s.secret and s.category is not None
        ]


@dataclass(frozen=True)
class Special:
    """What of the tokenizer is needed below the text level."""

    end_id: int
    neutral_id: int
    vocab: int
    special_ids: tuple[int, ...] = ()
    typed: tuple[tuple[int, ...], ...] = ()
    """Each category's name in brackets: what a typed placeholder reads."""

    @classmethod
    def of(cls, tokenizer: Any, vocab: int) -> Special:
        """Neutral token: the letter X, which every vocabulary has."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        return cls(
            end_id=int(tokenizer.eos_token_id),
            neutral_id=ids("X")[-1],
            vocab=vocab,
            special_ids=tuple(sorted(tokenizer.all_special_ids)),
            typed=tuple(ids(f"[{c.upper()}]") for c in CATEGORIES),
        )
