"""Seeded generator of multi-agent scenarios over healthcare, finance, legal and corporate.

A record draws fields from its type's schema, writes each in one of many phrasings between filler
sentences, and asks about all of them: directly, derived (a band, an age group, yes or no), and
about fields that are not there. The same ``(seed, split, index)`` always gives the same scenario.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lcguard.agents.scenarios import phrasing
from lcguard.agents.scenarios.forms import FORMS, NOTE, Around
from lcguard.agents.scenarios.schema import RECORD_TYPES, FieldType, RecordType
from lcguard.agents.scenarios.types import AgentSpec, EdgeSpec, Question, Record, Scenario, Span
from lcguard.agents.scenarios.values import anything, pick
from lcguard.categories import CATEGORIES
from lcguard.rule import Rule

ROLES = ("intake", "analyst", "reviewer", "coordinator")


@dataclass(frozen=True)
class GeneratorConfig:
    seed: int = 0
    split: str = "train"
    min_fields: int = 5
    max_fields: int = 8
    filler: int = 3
    """Most filler sentences in a record."""
    generic_rate: float = 0.3
    """Share of records that also hold a field which no schema knows."""
    max_agents: int = 4
    absent_questions: int = 1
    forms: tuple[str, ...] = (NOTE,)
    """Layouts, of which each record has one: see ``forms.py``."""


def _generic(rng: random.Random, split: str) -> FieldType:
    word = pick(rng, "word", split)
    label = f"{word} {rng.choice(('code', 'entry', 'item', 'reference', 'remark'))}"
    return FieldType(label.replace(" ", "_"), None, anything, (label,))


def choose_fields(rng: random.Random, kind: RecordType, low: int, high: int) -> list[FieldType]:
    """At least one secret and one task field; the rest by the schema's rates."""
    most = len(kind.fields)
    wanted = rng.randint(min(low, most), min(high, most))
    pool = list(kind.fields)
    weights = [f.rate for f in pool]
    chosen: list[FieldType] = []
    while len(chosen) < wanted:
        i = rng.choices(range(len(pool)), weights=weights)[0]
        chosen.append(pool.pop(i))
        weights.pop(i)
    for need_secret in (True, False):
        if all((f.category is not None) != need_secret for f in chosen):
            chosen[rng.randrange(len(chosen))] = rng.choice(
                [f for f in pool if (f.category is not None) == need_secret]
            )
    rng.shuffle(chosen)
    return chosen


def _note(
    rng: random.Random, noun: str, fields: Sequence[FieldType], filler: int
) -> Iterator[Around]:
    """Sentences, some between them that say nothing; drawn one by one, between the questions."""
    opening = phrasing.fill(rng.choice(phrasing.OPENINGS), noun=noun)
    gaps = {rng.randint(0, len(fields)) for _ in range(rng.randint(0, filler))}
    yield opening, ""
    fresh = not opening
    for i, field in enumerate(fields):
        between = ""
        if i in gaps:
            between, fresh = " " + rng.choice(phrasing.FILLER), False
        before, after = phrasing.sentence(rng, rng.choice(field.labels), noun)
        yield between + ("" if fresh else " ") + before, after
        fresh = after.endswith("\n")


def write_record(
    rng: random.Random,
    record_id: str,
    kind: RecordType,
    entries: list[tuple[FieldType, str]],
    *,
    filler: int = 0,
    absent: list[FieldType] | None = None,
    form: str = NOTE,
) -> Record:
    """Prose, spans and questions for the given field values, in one of the layouts."""
    fields = [field for field, _ in entries]
    if form == NOTE:
        around = _note(rng, kind.noun, fields, filler)
    else:
        around = FORMS[form](rng, kind.noun, [rng.choice(f.labels) for f in fields])
    text, _ = next(around)
    spans: list[Span] = []
    questions: list[Question] = []
    for field, value in entries:
        before, after = next(around)
        text += before
        band = field.band(value) if field.band else None
        end = len(text) + len(value)
        spans.append(Span(len(text), end, field.name, field.category, value, band))
        text += value + after
        label = rng.choice(field.labels)
        asked = phrasing.question(rng, label, kind.noun)
        questions.append(Question(asked, value, field.name, field.category))
        if band is not None:
            asked = phrasing.fill(rng.choice(field.band_question), label=label, noun=kind.noun)
            questions.append(Question(asked, band, field.name, field.category, "derived"))
    for field in absent or []:
        asked = phrasing.question(rng, rng.choice(field.labels), kind.noun)
        questions.append(Question(asked, phrasing.ABSENT, field.name, field.category, "absent"))
    return Record(
        record_id, kind.name, kind.vertical, text.rstrip("\n"), tuple(spans), tuple(questions)
    )


def make_record(
    rng: random.Random, config: GeneratorConfig, record_id: str, kind: RecordType | None = None
) -> Record:
    """One random record."""
    kind = kind or rng.choice(RECORD_TYPES)
    fields = choose_fields(rng, kind, config.min_fields, config.max_fields)
    missing = [f for f in kind.fields if f not in fields]
    if rng.random() < config.generic_rate:
        fields.insert(rng.randint(0, len(fields)), _generic(rng, config.split))
    entries = [(f, f.sample(rng, config.split)) for f in fields]
    absent = rng.sample(missing, min(config.absent_questions, len(missing)))
    form = rng.choice(config.forms) if len(config.forms) > 1 else config.forms[0]
    return write_record(
        rng, record_id, kind, entries, filler=config.filler, absent=absent, form=form
    )


def make_scenario(config: GeneratorConfig, index: int) -> Scenario:
    """A chain of one to four agents; each hands its record to the next, the last to the user."""
    rng = random.Random(f"{config.seed}/{config.split}/{index}")
    vertical = rng.choice(sorted({r.vertical for r in RECORD_TYPES}))
    kinds = [r for r in RECORD_TYPES if r.vertical == vertical]
    n_agents = rng.randint(1, config.max_agents)
    name = f"gen-{config.split}-{config.seed}-{index}"
    agents, edges = [], []
    for i in range(n_agents):
        record = make_record(rng, config, f"{name}-{i}", rng.choice(kinds))
        agents.append(AgentSpec(ROLES[i], ROLES[i], (record,)))
        audience = ROLES[i + 1] if i + 1 < n_agents else "requester"
        edges.append(EdgeSpec(ROLES[i], audience, Rule(CATEGORIES)))
    return Scenario(name, "generator", vertical, tuple(agents), tuple(edges))
