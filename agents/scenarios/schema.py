"""Record types of the four verticals, read from ``records.toml``, which says what stands there."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lcguard.agents.scenarios import values
from lcguard.agents.scenarios.files import own_data
from lcguard.agents.scenarios.values import Sampler

Band = Callable[[str], str | None]


@dataclass(frozen=True)
class FieldType:
    name: str
    category: str | None
    """None: a task field."""
    sample: Sampler
    labels: tuple[str, ...]
    rate: float = 0.5
    band: Band | None = None
    """The derived value: a risk band, a salary band, an age group."""
    band_question: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordType:
    name: str
    vertical: str
    noun: str
    fields: tuple[FieldType, ...]


_DATA = own_data("records.toml")
_RISK = {name: band for band, names in _DATA["diagnoses"].items() for name in names}
_WORDS: dict[str, list[str]] = {**_DATA["words"], "diagnoses": list(_RISK)}


def amount_band(text: str) -> str | None:
    """low below 80,000, medium below 160,000, else high."""
    try:
        value = float(text)
    except ValueError:
        return None
    return "low" if value < 80_000 else "medium" if value < 160_000 else "high"


def age_group(text: str) -> str | None:
    """By year of birth: senior before 1960, middle-aged before 1985, else young adult."""
    year = text[:4]
    if not year.isdigit():
        return None
    return "senior" if year < "1960" else "middle-aged" if year < "1985" else "young adult"


def recency(text: str) -> str | None:
    """yes if the date lies in 2024 or later."""
    return ("yes" if text[:4] >= "2024" else "no") if text[:4].isdigit() else None


def is_open(text: str) -> str | None:
    if text not in _WORDS["statuses"]:
        return None
    return "no" if text in ("closed", "resolved") else "yes"


_BANDS: dict[str, Band] = {
    "amount": amount_band,
    "risk": _RISK.get,
    "age": age_group,
    "recency": recency,
    "open": is_open,
}


def _sampler(name: str, *arguments: Any) -> Sampler:
    """A sampler of ``values``, or what a function there makes of arguments."""
    found = getattr(values, name)
    if not arguments:
        return found  # type: ignore[no-any-return]
    return found(*(_WORDS[a[1:]] if str(a).startswith("@") else a for a in arguments))  # type: ignore[no-any-return]


def _field(entry: str | Mapping[str, Any]) -> FieldType:
    given: Mapping[str, Any] = {"like": entry} if isinstance(entry, str) else entry
    like = given.get("like")
    told = {"name": like, **(_DATA["shared"][like] if like else {}), **given}
    band = told.get("band")
    return FieldType(
        told["name"],
        told.get("category"),
        _sampler(*told["sample"]),
        tuple(told["labels"]),
        told.get("rate", 0.5),
        _BANDS[band] if band else None,
        tuple(_DATA["band_questions"][band]) if band else (),
    )


RECORD_TYPES = tuple(
    RecordType(
        told["name"],
        told["vertical"],
        told.get("noun", told["name"]),
        tuple(_field(entry) for entry in told["fields"]),
    )
    for told in _DATA["record"]
)
BY_NAME = {r.name: r for r in RECORD_TYPES}
FIELD_CATEGORY: dict[str, str] = {
    f.name: f.category for r in RECORD_TYPES for f in r.fields if f.category is not None
}


def category_values(category: str, n: int = 256) -> list[str]:
    """Made-up values of a category, of all its fields in turn, in the training vocabulary."""
    fields = [f for r in RECORD_TYPES for f in r.fields if f.category == category]
    rng = random.Random(f"surrogates/{category}")
    return [fields[i % len(fields)].sample(rng, "train") for i in range(n)]


def sample_value(field: str, rng: random.Random, split: str = "test") -> str | None:
    """A value of a field, as a record of the split would have it; None for a field that no record
    type has. Types that share a field's name sample it alike, or take turns."""
    known = [f for r in RECORD_TYPES for f in r.fields if f.name == field]
    return rng.choice(known).sample(rng, split) if known else None


def sample_banded(
    record_type: str, field: str, rng: random.Random, split: str = "test"
) -> tuple[str, str | None] | None:
    """A value of a record type's own field, with its band; None for one that it does not have."""
    kind = BY_NAME.get(record_type)
    for f in kind.fields if kind else ():
        if f.name == field:
            value = f.sample(rng, split)
            return value, f.band(value) if f.band else None
    return None
