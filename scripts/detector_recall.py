"""How much of what a category means the detector of ``lcguard.server.detection`` finds: RECALL.

    LCGUARD_DATA=... python scripts/detector_recall.py

Counted are labelled values; one is found if each of its letters and digits is covered. ``world``
are identity, tax and passport numbers as Faker makes them for its countries. A source's name with
``respelled`` has each value in one of the spellings of lcguard.agents.scenarios.respell.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from faker import Faker
from faker.config import AVAILABLE_LOCALES

from lcguard.agents.scenarios.agentleak import read_agentleak
from lcguard.agents.scenarios.generator import GeneratorConfig, make_scenario
from lcguard.agents.scenarios.respell import respell
from lcguard.agents.scenarios.types import Scenario
from lcguard.server.detection.detector import ENTITIES, Detector

N_SCENARIOS, N_EACH = 400, 10
Labelled = tuple[str, int, int, str]
"""A text, where a value stands in it, and the value's category."""


def of(scenarios: Iterable[Scenario]) -> Iterator[Labelled]:
    """The labelled values of records."""
    for scenario in scenarios:
        for agent in scenario.agents:
            for record in agent.records:
                for s in record.spans:
                    if s.category in ENTITIES.values():
                        yield record.text, s.start, s.end, s.category


def world() -> Iterator[Labelled]:
    """Numbers of many countries in a sentence."""
    for locale in sorted(AVAILABLE_LOCALES):
        fake = Faker(locale)
        fake.seed_instance(1)
        for _ in range(N_EACH):
            for made in (fake.ssn(), fake.passport_number()):
                head = "The number on file is "
                yield f"{head}{made}, as stated.", len(head), len(head) + len(made), "government_id"


def respelled(values: Iterable[Labelled], seed: int) -> Iterator[Labelled]:
    """Each value in a spelling drawn at random."""
    rng = random.Random(seed)
    for text, start, end, category in values:
        written = respell(rng, text[start:end])
        yield text[:start] + written + text[end:], start, start + len(written), category


def measure(detector: Detector, values: Iterable[Labelled]) -> dict[str, tuple[int, int]]:
    """Found and all values of each category."""
    n, found = Counter[str](), Counter[str]()
    for text, start, end, category in values:
        n[category] += 1
        hits = detector.find(text, (category,))  # type: ignore[arg-type]
        found[category] += all(
            any(a <= i < b for a, b in hits) for i in range(start, end) if text[i].isalnum()
        )
    return {c: (found[c], n[c]) for c in sorted(n)}


def main() -> None:
    """Prints the table's lines."""
    warnings.filterwarnings("ignore")
    detector = Detector()
    config = GeneratorConfig(seed=1, split="test")
    sources = {
        "generator": list(of(make_scenario(config, i) for i in range(N_SCENARIOS))),
        "AgentLeak": list(of(read_agentleak())),
        "world": list(world()),
    }
    for name, values in sources.items():
        print(f'    "{name}": {measure(detector, values)},')
        print(f'    "{name}, respelled": {measure(detector, respelled(values, 1))},')


if __name__ == "__main__":
    main()
