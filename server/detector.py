"""Finds personal data in text by Presidio's patterns, offline: for edges with ``detect: presidio``.

A blank spaCy pipeline, because models would have to be downloaded. So patterns alone are found
(numbers, addresses), no names and no diagnoses: ``COVERED`` says which categories that covers.
"""

from __future__ import annotations

from typing import Any

from lcguard.categories import Category
from lcguard.policy import PolicyError

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
COVERED: tuple[Category, ...] = ("government_id",)
"""Categories whose values have a pattern; a postal address or a password has none. No detector
finds every value."""


class Detector:
    """Presidio's analyzer, without network."""

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

    def find(self, text: str, forbid: tuple[Category, ...]) -> list[tuple[int, int]]:
        """Character ranges of what belongs to a forbidden category."""
        wanted = [e for e, category in ENTITIES.items() if category in forbid]
        if not wanted:
            return []
        found = self._engine.analyze(text, language="en", entities=wanted, score_threshold=0.05)
        return sorted((f.start, f.end) for f in found)
