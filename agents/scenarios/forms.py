"""Layouts in which a record's fields may stand, beside the plain note: what tools return, and what
people write to each other, with numbers and dates around that are nobody's secret."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from lcguard.agents.scenarios import phrasing
from lcguard.agents.scenarios.files import own_data

_WORDS = own_data("words.toml")["forms"]
Around = tuple[str, str]
"""Text before and after a value."""
Form = Callable[[random.Random, str, Sequence[str]], Iterator[Around]]
"""From a record's noun and its fields' labels, in order: the head, in the place of *before*, then
what stands around each value."""


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2019, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"


def _aside(rng: random.Random) -> str:
    text: str = rng.choice(_WORDS["asides"])
    return text.format(n=rng.randint(2, 4999), time=_time(rng), date=_date(rng))


def _said(rng: random.Random, noun: str, label: str) -> Around:
    """A sentence around the value, as a note or a colleague would put it."""
    if rng.random() < 0.3:
        before, after = phrasing.sentence(rng, label, noun)
        return before, after.rstrip("\n")
    pattern = rng.choice(_WORDS["sentences"])
    before, after = phrasing.fill(pattern, label=label, noun=noun).split("{value}")
    return before, after


def _key(label: str) -> str:
    return label.lower().replace(" ", "_")


def _json(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    """What a tool call returned."""
    end, indent = rng.choice((("\n", "  "), (" ", ""), ("", "")))
    tool = rng.choice(_WORDS["tools"])
    head = f'{{{end}{indent}"tool": "{tool}",{end}{indent}"id": {rng.randint(100, 99999)},{end}'
    yield f'{head}{indent}"retrieved": "{_date(rng)}T{_time(rng)}:00Z",{end}', ""
    for i, label in enumerate(labels):
        last = i == len(labels) - 1
        yield f'{indent}"{_key(label)}": "', f'"{"" if last else ","}{end}' + "}" * last


def _table(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    """One row a field, or one line of them all."""
    sheet = f"{noun.capitalize()}, sheet {rng.randint(2, 40)}, exported {_date(rng)}\n"
    if rng.random() < 0.5:
        bar, start = rng.choice((("|", "| "), ("\t", ""), (",", "")))
        space = " " if bar == "|" else ""
        yield sheet + f"{start}field{space}{bar}{space}value{space}{bar if start else ''}\n", ""
        for label in labels:
            yield f"{start}{label}{space}{bar}{space}", f"{space}{bar if start else ''}\n"
        return
    bar = rng.choice((" | ", "; ", "\t"))
    yield sheet + bar.join(map(_key, labels)) + "\n", ""
    for i in range(len(labels)):
        yield "", bar if i < len(labels) - 1 else ""


def _mail(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    a, b = rng.sample(_WORDS["desks"], 2)
    subject = phrasing.fill(rng.choice(_WORDS["subjects"]), noun=noun)
    date = f"{_date(rng)} {_time(rng)}"
    yield f"From: {a}\nTo: {b}\nDate: {date}\nSubject: {subject}\n\nHello,\n\n", ""
    for i, label in enumerate(labels):
        before, after = _said(rng, noun, label)
        aside = _aside(rng) + " " if rng.random() < 0.35 else ""
        tail = f"\n\nBest,\n{a}" if i == len(labels) - 1 else rng.choice((" ", " ", "\n"))
        yield aside + before, after + tail


def _chat(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    who = rng.sample(_WORDS["desks"], 2)
    minute = rng.randint(7 * 60, 20 * 60)

    def line(speaker: str) -> str:
        nonlocal minute
        minute += rng.randint(0, 5)
        return f"[{minute // 60:02}:{minute % 60:02}] {speaker}: "

    yield f"{line(who[0])}{_aside(rng)}\n", ""
    for label in labels:
        speaker = rng.choice(who)
        if rng.random() < 0.4:
            asked = phrasing.question(rng, label, noun)
            yield f"{line(who[speaker == who[0]])}{asked}\n{line(speaker)}", "\n"
            continue
        before, after = _said(rng, noun, label)
        yield line(speaker) + before, f"{after}\n"


def _ticket(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    number, desk = f"TCK-{rng.randint(1000, 99999)}", rng.choice(_WORDS["desks"])
    level = rng.choice(("low", "normal", "high"))
    yield f"{number} | priority {level} | {desk} | opened {_date(rng)}\n", ""
    for label in labels:
        before, after = _said(rng, noun, label)
        mark = rng.choice(("- ", "* ", f"Comment, {_date(rng)}: "))
        yield mark + before, after + (f" {_aside(rng)}\n" if rng.random() < 0.3 else "\n")


def _sections(rng: random.Random, noun: str, labels: Sequence[str]) -> Iterator[Around]:
    """Minutes, or a report under headings."""
    numbered, titles = rng.random() < 0.5, list(_WORDS["sections"])
    rng.shuffle(titles)
    present = ", ".join(rng.sample(_WORDS["desks"], 3))
    yield (f"Minutes of {_date(rng)}, present: {present}\n" if numbered else ""), ""
    for i, label in enumerate(labels):
        before, after = _said(rng, noun, label)
        head = f"{i + 1}. " if numbered else f"{titles[i // 2]}:\n" if i % 2 == 0 else ""
        if i % 2 == 0 and i // 2 >= len(titles) - 1:
            head = f"{i + 1}. "
        yield head + before, after + (f" {_aside(rng)}" if rng.random() < 0.3 else "") + "\n"


FORMS: dict[str, Form] = {
    "json": _json,
    "table": _table,
    "mail": _mail,
    "chat": _chat,
    "ticket": _ticket,
    "sections": _sections,
}
NOTE = "note"
ALL_FORMS = (NOTE, *FORMS)


def check_forms(forms: Sequence[str]) -> None:
    """Raises ``ValueError`` for a layout that is not known, or none."""
    unknown = [f for f in forms if f not in ALL_FORMS]
    if unknown or not forms:
        raise ValueError(f"forms = {list(forms)}: use one or more of {', '.join(ALL_FORMS)}")
