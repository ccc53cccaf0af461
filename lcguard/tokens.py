"""Records as an agent's model reads them: token ids, with the values and questions among them."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lcguard.categories import CATEGORIES
from lcguard.rule import Rule

NEAREST = 64
"""Values, nearest in length to the one they stand for, among which a surrogate is drawn."""


REPEAT: Final = "repeat"
"""Field of a span that repeats another's value."""


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
    def forbid(self) -> tuple[str, ...]:
        return self.rule.forbid

    @property
    def derive(self) -> tuple[str, ...]:
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
    values: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Each category's made-up values: what stands for a real one as its surrogate."""

    @classmethod
    def of(cls, tokenizer: Any, vocab: int, values: Sequence[Sequence[str]] = ()) -> Special:
        """Neutral token: the letter X, which every vocabulary has. ``values``: texts of each
        category."""

        def every(texts: Sequence[str]) -> list[tuple[int, ...]]:
            return [tuple(i) for i in tokenizer([*texts], add_special_tokens=False)["input_ids"]]

        def ids(text: str) -> tuple[int, ...]:
            return every([text])[0]

        return cls(
            end_id=int(tokenizer.eos_token_id),
            neutral_id=ids("X")[-1],
            vocab=vocab,
            special_ids=tuple(sorted(tokenizer.all_special_ids)),
            typed=tuple(ids(f"[{c.upper()}]") for c in CATEGORIES),
            values=tuple(tuple(dict.fromkeys(every([f" {v}" for v in row]))) for row in values),
        )

    def surrogate(self, category: int, value: Sequence[int], key: bytes) -> tuple[int, ...]:
        """Another value of the category, of about as many tokens: the same one for the same value
        under the same key, and for nobody else to foresee.

        Raises ``ValueError`` where there is no key, or no other value of the category.
        """
        if not key:
            raise ValueError("a surrogate needs its segment's key")
        others = [v for v in self.values[category] if v != tuple(value)] if self.values else []
        if not others:
            raise ValueError(f"no surrogates for {CATEGORIES[category]}: this model has none")
        near = sorted(others, key=lambda v: abs(len(v) - len(value)))[:NEAREST]
        told = b"".join(i.to_bytes(4, "big") for i in (category, *value))
        drawn = hmac.digest(key, told, "sha256")
        return near[int.from_bytes(drawn[:8], "big") % len(near)]
