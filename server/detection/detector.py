"""Finds personal data in text by patterns, offline: for edges with ``detect: presidio``.

Presidio's recognisers that need no language model, so no names and no diagnoses are found. Beside
their patterns, which know the numbers of few countries, whatever is built like an official number
is found (``numbers``).

Detection reads a text as a person does: without invisible characters, in plain digits and dashes,
with markup, escapes and separators aside; what it finds is mapped back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lcguard.categories import Category
from lcguard.evaluation.intervals import wilson
from lcguard.handoff.policy import PolicyError
from lcguard.normalise import Form, folded
from lcguard.presidio import offline_presidio
from lcguard.server.detection.official_numbers import official_numbers
from lcguard.unescape import unescaped
from lcguard.value_search import Range, merged

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
WEAKEST = 0.05
"""Presidio's score of a pattern that says little: a number of that length."""
WINDOW, OVERLAP = 20_000, 400
"""Characters: a long text is looked through in pieces, since some recognisers give up on it."""
_MARKUP = str.maketrans({"*": None, "~": None, "`": None, "_": " "})


RECALL: dict[str, dict[Category, tuple[int, int]]] = {
    "generator": {"account": (114, 198), "contact": (456, 682), "government_id": (383, 407)},
    "generator, respelled": {
        "account": (108, 198),
        "contact": (418, 682),
        "government_id": (384, 407),
    },
    "AgentLeak": {"account": (381, 693), "contact": (1153, 3218), "government_id": (615, 1144)},
    "AgentLeak, respelled": {
        "account": (350, 693),
        "contact": (1010, 3218),
        "government_id": (629, 1144),
    },
    "world": {"government_id": (2200, 2200)},
    "world, respelled": {"government_id": (2199, 2200)},
}
"""Values found, and all there are, by source: measured by scripts/detector_recall.py."""
NEEDED = 0.99


def vouched(detect: str) -> tuple[Category, ...]:
    """Categories of which a detector finds so many values that a publisher need name none: in
    each source of ``RECALL`` at least ``NEEDED``, at 95% confidence.

    None, as measured: numbers are found, but what records file as a government's number is not
    always one (AgentLeak has marks and sentences there).
    """
    if detect != "presidio":  # of the text detector's categories none reaches it
        return ()
    rows = list(RECALL.values())
    return tuple(
        c
        for c in dict.fromkeys(ENTITIES.values())
        if all(wilson(*row[c]).low >= NEEDED for row in rows if c in row)
        and any(c in row for row in rows)
    )


class Detector:
    """Presidio's recognisers, without network, and the form of official numbers."""

    def __init__(self) -> None:
        """Raises ``PolicyError`` where Presidio is not installed."""
        try:
            self._registry = offline_presidio()
        except ImportError:
            raise PolicyError(
                "detect: presidio needs Presidio: pip install 'lcguard[pii]'"
            ) from None

    def find(self, text: str, forbid: Collection[str]) -> list[Range]:
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
        known = self._registry.get_recognizers(language="en", entities=wanted)
        out = []
        for at in range(0, max(1, len(text)), WINDOW):
            first = max(0, at - OVERLAP)
            piece = text[first : at + WINDOW]
            # without Presidio's look at the words around, which costs the square of the hits and
            # only tells weak ones from strong ones
            for found in (f for r in known for f in r.analyze(piece, wanted, None) or ()):
                if found.entity_type in wanted and found.score >= WEAKEST:
                    out.append((first + found.start, first + found.end))
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
