"""A head that finds a category of a policy's own, trained from examples (``lcguard detect train``).

A folder with a card (JSON) and weights (safetensors). The head reads what the shipped detector of
text reads, so it fits that detector alone; the card says which, and from which examples it was
made. A head that is another's, or was altered, is refused before anything is looked for with it.

Values are found by ``lcguard.detect``, which whoever composes loads by its name: the rules of a hop
load no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import lcguard
from lcguard.canonical import canonical_digest
from lcguard.value_search import Range, merged

CARD, WEIGHTS = "lcguard_category.json", "head.safetensors"
SUFFIX = ".detector"
"""Of the folder beside a file of examples, where a policy names none."""
MIN_RECALL = 0.9
"""What the share of values found has to be at least, at the card's level, or ``policy check``
warns."""
_SAME = ("guard", "options", "shape", "categories", "model_digest", "weights_sha256")


class Measured(BaseModel):
    """What a head found of examples that it was not fitted on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    found: int
    total: int
    recall: float
    recall_lower: float
    """Clopper and Pearson's one-sided bound at ``level``."""
    level: float
    examples_flagged: float
    """Share of the tokens of the examples, outside of values, that were taken for one."""
    negatives_flagged: float
    """The same of texts without the category."""


class HeadCard(BaseModel):
    """What a head is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    category: str
    base_sha256: str
    """Of the detector whose features it reads."""
    examples_sha256: str
    """Of the file."""
    n_examples: int
    features: int
    width: int
    threshold: float
    """Logit above which a token belongs to a value."""
    peak: float
    """Logit that one token of a value has at least."""
    target_recall: float
    """For which both were chosen."""
    held_out: Measured
    weights_sha256: str


@dataclass(frozen=True)
class CategoryHead:
    """A head as it was read, whole. Equal heads have equal cards: these name the weights."""

    card: HeadCard
    weights: bytes = field(repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> CategoryHead:
        """Raises ``ValueError`` in one line where it is missing, damaged or of another release."""
        try:
            card = HeadCard.model_validate_json((folder / CARD).read_bytes())
            weights = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{folder / CARD}: {where}: {first['msg']}") from None
        if hashlib.sha256(weights).hexdigest() != card.weights_sha256:
            raise ValueError(f"{folder / WEIGHTS} is not what its card says: it was altered or cut")
        return cls(card, weights)

    def check(self, category: str, examples: Path | None) -> None:
        """Raises ``ValueError`` saying what it was made for instead, where that is something else
        than this category, these examples and this release's detector."""
        if self.card.category != category:
            raise ValueError(f"was trained for {self.card.category!r}")
        if examples is not None and examples_digest(examples) != self.card.examples_sha256:
            raise ValueError(f"was trained on other examples than {examples.name} has now")
        if self.card.base_sha256 != base_digest():
            raise ValueError("was trained for another detector of text than this release has")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of card and weights."""
        return canonical_digest(self.card.model_dump(mode="json"))


def default_folder(examples: Path) -> Path:
    return examples.with_suffix(SUFFIX)


def examples_digest(path: Path) -> str:
    """SHA-256 of the file. Raises ``ValueError`` where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1)
def base_digest() -> str:
    """Of the shipped detector of text, by its card: its model, what it reads and its weights."""
    card = files("lcguard.agents.smollm2") / "guards" / "text" / "lcguard_config.json"
    said = json.loads(card.read_text(encoding="utf-8"))
    return canonical_digest({name: said[name] for name in _SAME})


def find_heads(text: str, heads: Collection[CategoryHead]) -> dict[str, list[Range]]:
    """Of each category, the character ranges of what any of its heads finds, in order. The text is
    read once for all of them.

    Raises ``ValueError`` where the model that reads the text cannot be loaded.
    """
    if not heads:
        return {}
    found: dict[str, list[Range]] = {head.card.category: [] for head in heads}
    for span in lcguard.detect(text, (), own=list(heads), apart=False):
        found[span.category].append((span.start, span.end))
    return {category: merged(places) for category, places in found.items()}
