"""Presidio without network: its recognisers alone, or its analyzer over a spaCy pipeline."""

from __future__ import annotations

from typing import Any


def offline_presidio(pipeline: str | None = None) -> Any:
    """The registry of recognisers that need no language model, or with a spaCy ``pipeline`` the
    analyzer over it.

    Raises ``ImportError`` or ``OSError`` where one of them is not installed.
    """
    import tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry

    # its recogniser of e-mail addresses would fetch the list of public suffixes
    setattr(tldextract, "extract", tldextract.TLDExtract(suffix_list_urls=()))  # noqa: B010
    if pipeline is None:
        registry = RecognizerRegistry(supported_languages=["en"])
        registry.load_predefined_recognizers(languages=["en"])
        return registry
    return AnalyzerEngine(nlp_engine=_engine_over(pipeline), supported_languages=["en"])


def _engine_over(pipeline: str) -> Any:
    import spacy
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine

    loaded = spacy.load(pipeline)

    class Loaded(SpacyNlpEngine):
        nlp: Any

        def __init__(self) -> None:
            super().__init__(ner_model_configuration=NerModelConfiguration())
            self.nlp = {"en": loaded}

        def load(self) -> None:
            pass

    return Loaded()
