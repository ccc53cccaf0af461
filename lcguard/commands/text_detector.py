"""Finds personal data in any text, for models that have no detector of their own, and for text that
goes to no model.

The first layers of a small model read the text and a detector reads their latents, so that names,
diagnoses and whatever else only the sentence makes private are found, offline, on a CPU. What it
reads is the text alone: the guarded agent's model may be any.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.types import Hop
from lcguard.categories import CATEGORIES, Category
from lcguard.evaluation.detection import overlapping
from lcguard.evaluation.load import load_guard
from lcguard.evaluation.plan import GuardSpec
from lcguard.guards import FrozenGuard, guard_class
from lcguard.guards.detector import runs
from lcguard.nearest import unknown
from lcguard.normalise import folded
from lcguard.records import mask_of
from lcguard.rule import Rule

MODEL, GUARD = "smollm2", "smollm2:text"
WINDOW_TOKENS, OVERLAP_TOKENS = 512, 128
"""A long text is read in pieces: the detector learnt on texts of some hundred tokens."""
BATCH = 8
_WHITE = re.compile("[ \t\n\r]+")


@dataclass(frozen=True, order=True)
class Span:
    """A value in a text."""

    start: int
    """Of its characters ``[start, end)``."""
    end: int
    category: Category


class TextDetector:
    """A model, as far as it is read, and its detector. Loading takes seconds and half a gigabyte.

    Raises ``ValueError`` in one line where the model cannot be made or the guard has no detector.
    """

    def __init__(self, model: str = MODEL, guard: str = GUARD) -> None:
        card = FrozenGuard.from_pretrained(guard).card
        if not guard_class(card.guard).finds_secrets:
            raise ValueError(f"guard {card.guard!r} finds nothing itself: give one with a detector")
        backend = load_backend(model, reader=False, first_layers=card.shape[0])
        self.encoder, self.source = backend.encoder, backend.source
        self._guard = load_guard(GuardSpec("detector", path=guard), backend)

    def find(self, text: str, forbid: Collection[str] = CATEGORIES) -> list[Span]:
        """Values of the categories, in order, none overlapping.

        The text is read as it stands and, where that differs, as a person sees it: without
        unseen characters, in plain widths, digits, dashes and spaces.
        """
        found = self._read(text, forbid)
        plain = folded(text)
        if plain.text != _WHITE.sub(" ", text):
            found += [
                Span(*plain.origin(s.start, s.end), s.category)
                for s in self._read(plain.text, forbid)
            ]
        return _apart(found)

    def _read(self, text: str, forbid: Collection[str]) -> list[Span]:
        """Of each piece what it shows; the pieces overlap."""
        if not text.strip() or not forbid:
            return []
        ids, offsets = self.encoder.context(text), self.encoder.offsets(text)
        own = next((i for i, (_, end) in enumerate(offsets) if end > 0), len(ids))
        pieces = list(_windows(own, len(ids)))
        out = list[Span]()
        for first in range(0, len(pieces), BATCH):
            some = pieces[first : first + BATCH]
            kv = self.source.prefill([ids[:own] + ids[a:b] for a, b in some])
            marks = self._guard.marks(kv, mask_of([Rule.hiding(forbid)] * len(some)))
            assert marks is not None  # it finds secrets
            for (a, b), row in zip(some, marks.tolist(), strict=True):
                for start, end, category in runs(row[own : own + b - a]):
                    low, high = offsets[a + start][0], offsets[a + end - 1][1]
                    out += _trimmed(text, max(0, low), high, CATEGORIES[category])
        return out

    def marks(self, hops: Sequence[Hop]) -> list[Tensor]:
        """For each hop's context, which tokens of ``encoder`` overlap what is found of the
        categories that its policy forbids: ``[T]`` bool."""
        return [
            overlapping(
                self.encoder.offsets(hop.record.text),
                [(s.start, s.end) for s in self.find(hop.record.text, hop.edge.rule.forbid)],
            )
            for hop in hops
        ]


@lru_cache(maxsize=1)
def shared_text_detector() -> TextDetector:
    """The one of this process."""
    return TextDetector()


def detect(text: str, categories: Collection[Category] = CATEGORIES) -> list[Span]:
    """Personal data in a text: character ranges with their category, in order.

    ``for span in lcguard.detect(note): print(span.category, note[span.start:span.end])``

    Reads with the first five layers of SmolLM2-135M-Instruct, which the first call loads (extra
    ``real``). How much it finds of text that it never saw is in docs/results.md; it vouches for no
    value.

    Raises ``ValueError`` for an unknown category, and where the model cannot be loaded.
    """
    for category in categories:
        if category not in CATEGORIES:
            raise ValueError(unknown("category", category, CATEGORIES))
    return shared_text_detector().find(text, categories)


def _windows(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``WINDOW_TOKENS`` that cover ``[first, end)``."""
    step = WINDOW_TOKENS - OVERLAP_TOKENS
    for at in range(first, max(first + 1, end - OVERLAP_TOKENS), step):
        yield at, min(end, at + WINDOW_TOKENS)


def _trimmed(text: str, start: int, end: int, category: Category) -> Iterator[Span]:
    """Tokens begin with the space before a word, which is no part of the value."""
    value = text[start:end]
    if bare := value.strip():
        low = start + value.index(bare)
        yield Span(low, low + len(bare), category)


def _apart(found: Sequence[Span]) -> list[Span]:
    """In order; what overlaps is one span, of the category that comes first."""
    out: list[Span] = []
    for span in sorted(found):
        if out and span.start < out[-1].end:
            out[-1] = Span(out[-1].start, max(out[-1].end, span.end), out[-1].category)
        else:
            out.append(span)
    return out
