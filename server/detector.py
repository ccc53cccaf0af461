"""Finds personal data in text by patterns, offline: for edges with ``detect: presidio``.

Presidio without a language model: a blank spaCy pipeline, because models would have to be
downloaded. So no names and no diagnoses are found. Beside Presidio's patterns, which know the
numbers of few countries, whatever is built like an official number is found (``numbers``).

Detection reads a text as a person does: without invisible characters, in plain digits and dashes,
with markup, escapes and separators aside; what it finds is mapped back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lcguard.categories import Category
from lcguard.escapes import unescaped
from lcguard.evaluation.intervals import wilson
from lcguard.normalise import Form, folded
from lcguard.policy import PolicyError
from lcguard.server.numbers import official_numbers
from lcguard.spelling import Range, merged

ENTITIES: dict[str, Category] = {
    "US_SSN": "government_id",
    "US_PASSPORT": "government_id",
    "US_DRIVER_LICENSE": "government_id",
    "US_ITIN": "government_id",
    "EMAIL_ADDRESS": "contact",
    "PHONE_NUMBER": "contact",
    "CREDIT_CARD": "account",
    "IBAN_CODE": "account",
    "US_BANK_NUMBER": "account",
    "CRYPTO": "account",
}
"""Presidio's entity to ours."""
WINDOW, OVERLAP = 20_000, 400
"""Characters: a long text is looked through in pieces, which spaCy would refuse as a whole."""
_MARKUP = str.maketrans({"*": None, "~": None, "`": None, "_": " "})


RECALL: dict[str, dict[Category, tuple[int, int]]] = {
    "generator": {"account": (114, 198), "contact": (456, 682), "government_id": (383, 407)},
    "generator, respelled":
        {"account": (108, 198), "contact": (418, 682), "government_id": (384, 407)},
    "AgentLeak": {"account": (381, 693), "contact": (1153, 3218), "government_id": (615, 1144)},
    "AgentLeak, respelled":
        {"account": (350, 693), "contact": (1010, 3218), "government_id": (629, 1144)},
    "world": {"government_id": (2200, 2200)},
    "world, respelled": {"government_id": (2199, 2200)},
}  # fmt: skip
"""Values found, and all there are, by source: measured by scripts/detector_recall.py."""
NEEDED = 0.99


def vouched(detect: str) -> tuple[Category, ...]:
    """Categories of which a detector finds so many values that a publisher need name none: in
    each source of ``RECALL`` at least ``NEEDED``, at 95% confidence.

    None, as measured: numbers are found, but what records file as a government's number is not
    always one (AgentLeak has marks and sentences there).
    """
    if detect == "none":
        return ()
    rows = list(RECALL.values())
    return tuple(
        c for c in dict.fromkeys(ENTITIES.values())
        if all(wilson(*row[c]).low >= NEEDED for row in rows if c in row)
        and any(c in row for row in rows)
    )  # fmt: skip


class Detector:
    """Presidio's analyzer, without network, and the form of official numbers."""

    def __init__(self) -> None:
        """Raises ``PolicyError`` where Presidio is not installed."""
        try:
            import spacy
            import tldextract
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError:
            raise PolicyError(
                "detect: presidio needs Presidio: pip install 'lcguard[pii]'"
            ) from None
        # its recogniser of e-mail addresses would fetch the list of public suffixes
        setattr(tldextract, "extract", tldextract.TLDExtract(suffix_list_urls=()))  # noqa: B010

        class Blank(SpacyNlpEngine):
            nlp: Any

            def load(self) -> None:
                self.nlp = {"en": spacy.blank("en")}

        self._engine: Any = AnalyzerEngine(nlp_engine=Blank(), supported_languages=["en"])

    def find(self, text: str, forbid: tuple[Category, ...]) -> list[Range]:
        """Character ranges of what belongs to a forbidden category, in order, none overlapping."""
        wanted = [e for e, category in ENTITIES.items() if category in forbid]
        found: list[Range] = []
        for form in _forms(text) if wanted else ():
            hits = self._presidio(form.text, wanted)
            if "government_id" in forbid:
                hits = [*hits, *official_numbers(form.text)]
            found += (form.origin(a, b) for a, b in hits)
        return merged(found)

    def _presidio(self, text: str, wanted: list[str]) -> list[Range]:
        out = []
        for at in range(0, max(1, len(text)), WINDOW):
            piece = text[max(0, at - OVERLAP) : at + WINDOW]
            found = self._engine.analyze(
                piece, language="en", entities=wanted, score_threshold=0.05
            )
            out += [(max(0, at - OVERLAP) + f.start, max(0, at - OVERLAP) + f.end) for f in found]
        return out


def _forms(text: str) -> Iterable[Form]:
    """The text as patterns can read it, as it stands and with its escapes read."""
    for inner in (None, unescaped(text)):
        if inner is None:
            yield _plain(text)
        else:
            yield _plain(inner.text).over(inner)


def _plain(text: str) -> Form:
    form = folded(text)
    kept = [
        (c2, a, b)
        for c, a, b in zip(form.text, form.starts, form.ends, strict=True)
        if (c2 := c.translate(_MARKUP))
    ]
    return Form("".join(k[0] for k in kept), tuple(k[1] for k in kept), tuple(k[2] for k in kept))
