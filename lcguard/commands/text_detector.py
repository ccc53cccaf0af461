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
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.types import Hop
from lcguard.categories import CATEGORIES, Category
from lcguard.category_head import CategoryHead
from lcguard.evaluation.detection import overlapping
from lcguard.evaluation.load import load_guard
from lcguard.evaluation.plan import GuardSpec
from lcguard.guards import FrozenGuard, guard_class
from lcguard.guards.detector import runs
from lcguard.guards.token_head import TokenHead, belonging
from lcguard.guards.twin import TwinGuard
from lcguard.nearest import unknown
from lcguard.normalise import folded
from lcguard.protocols import KVBatch
from lcguard.records import mask_of
from lcguard.rule import Rule
from lcguard.value_search import Range

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
    category: str
    """Of ``lcguard.categories``, or a policy's own."""


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
        self._heads: dict[str, TokenHead] = {}

    def find(
        self,
        text: str,
        forbid: Collection[str] = CATEGORIES,
        own: Sequence[CategoryHead] = (),
        apart: bool = True,
    ) -> list[Span]:
        """Values of the categories and of what ``own`` finds, in order; none overlapping where they
        are to be ``apart``.

        The text is read as it stands and, where that differs, as a person sees it: without
        unseen characters, in plain widths, digits, dashes and spaces.
        """
        forbid = [c for c in CATEGORIES if c in forbid]  # a policy's own are for ``own``
        found = self._read(text, forbid, own)
        plain = folded(text)
        if plain.text != _WHITE.sub(" ", text):
            found += [
                Span(*plain.origin(s.start, s.end), s.category)
                for s in self._read(plain.text, forbid, own)
            ]
        return _apart(found) if apart else sorted(found)

    def _read(self, text: str, forbid: Collection[str], own: Sequence[CategoryHead]) -> list[Span]:
        """Of each piece what it shows; the pieces overlap."""
        if not text.strip() or not (forbid or own):
            return []
        out = list[Span]()
        for kv, pieces in self._pieces(text):
            found: list[tuple[str, Tensor]] = []
            if forbid:
                marks = self._guard.marks(kv, mask_of([Rule.hiding(forbid)] * len(pieces)))
                assert marks is not None  # it finds secrets
                found += ((c, marks == i) for i, c in enumerate(CATEGORIES) if c in forbid)
            if own:
                read = self._features(kv)
                found += ((h.card.category, self._own_marks(read, kv.valid, h)) for h in own)
            for category, hits in found:
                for (first, offsets), row in zip(pieces, hits.int().tolist(), strict=True):
                    for start, end, _ in runs([m - 1 for m in row[first : first + len(offsets)]]):
                        low, high = offsets[start][0], offsets[end - 1][1]
                        out += _trimmed(text, max(0, low), high, category)
        return out

    def _pieces(self, text: str) -> Iterator[tuple[KVBatch, list[tuple[int, list[Range]]]]]:
        """KV of a text's pieces, some at a time; of each, its first token and the characters of
        that and the others."""
        ids, offsets = self.encoder.context(text), self.encoder.offsets(text)
        own = next((i for i, (_, end) in enumerate(offsets) if end > 0), len(ids))
        pieces = list(_windows(own, len(ids)))
        for first in range(0, len(pieces), BATCH):
            some = pieces[first : first + BATCH]
            kv = self.source.prefill([ids[:own] + ids[a:b] for a, b in some])
            yield kv, [(own, offsets[a:b]) for a, b in some]

    @torch.no_grad()
    def features(self, text: str) -> Iterator[tuple[Tensor, list[Range]]]:
        """What heads read: of each piece ``[t, F]``, and each token's characters."""
        for kv, pieces in self._pieces(text) if text.strip() else ():
            for (first, offsets), row in zip(pieces, self._features(kv), strict=True):
                yield row[first : first + len(offsets)].cpu(), offsets

    @torch.no_grad()
    def _features(self, kv: KVBatch) -> Tensor:
        module = self._guard.module
        assert isinstance(module, TwinGuard)  # it finds secrets
        return module.features(kv)

    @torch.no_grad()
    def _own_marks(self, features: Tensor, valid: Tensor, head: CategoryHead) -> Tensor:
        """``[B, T]`` bool."""
        if head.digest not in self._heads:
            made = TokenHead(head.card.features, head.card.width)
            made.load_state_dict(load(head.weights))
            self._heads[head.digest] = made.eval().to(features.device)
        logits = self._heads[head.digest](features, valid)
        return belonging(logits, valid, head.card.threshold, head.card.peak)

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


def detect(
    text: str,
    categories: Collection[Category] = CATEGORIES,
    own: Sequence[str | Path | CategoryHead] = (),
    *,
    apart: bool = True,
) -> list[Span]:
    """Personal data in a text: character ranges with their category, in order.

    ``for span in lcguard.detect(note): print(span.category, note[span.start:span.end])``

    Reads with the first five layers of SmolLM2-135M-Instruct, which the first call loads (extra
    ``real``). How much it finds of text that it never saw is in docs/results.md; it vouches for no
    value.

    Args:
        own: folders of ``lcguard detect train --name``, which find categories of your own.
        apart: what overlaps is one span, of the category that comes first; else each category has
            its own spans.

    Raises ``ValueError`` for an unknown category, a folder that holds no head for this release's
    detector, and where the model cannot be loaded.
    """
    for category in categories:
        if category not in CATEGORIES:
            raise ValueError(unknown("category", category, CATEGORIES))
    heads = [head if isinstance(head, CategoryHead) else _head(Path(head)) for head in own]
    return shared_text_detector().find(text, categories, heads, apart)


def _head(folder: Path) -> CategoryHead:
    head = CategoryHead.read(folder)
    try:
        head.check(head.card.category, None)
    except ValueError as error:
        raise ValueError(f"{folder} {error}: train it again") from None
    return head


def _windows(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``WINDOW_TOKENS`` that cover ``[first, end)``."""
    step = WINDOW_TOKENS - OVERLAP_TOKENS
    for at in range(first, max(first + 1, end - OVERLAP_TOKENS), step):
        yield at, min(end, at + WINDOW_TOKENS)


def _trimmed(text: str, start: int, end: int, category: str) -> Iterator[Span]:
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
