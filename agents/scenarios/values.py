"""Samplers of field values: Faker's name lists, checksum-valid identifiers from python-stdnum.

Every sampler takes a ``random.Random`` and a split. Open vocabularies (names, companies, streets)
are cut in two: a record of the split ``test`` uses only entries that no ``train`` record ever has.
The split ``coined`` is ``train`` with half of the open words spliced from two others: with so many
names an agent has to copy what it reads instead of recognising it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from functools import cache

from faker.providers.address.en_US import Provider as AddressProvider
from faker.providers.company.en_US import Provider as CompanyProvider
from faker.providers.lorem.en_US import Provider as LoremProvider
from faker.providers.person.en_US import Provider as PersonProvider
from stdnum import iban, luhn
from stdnum.us import ssn as us_ssn

Sampler = Callable[[random.Random, str], str]

SPLITS = ("train", "coined", "test")
_HELD_OUT = 5  # every fifth entry of an open vocabulary belongs to the test split


@cache
def vocabulary(name: str, split: str) -> tuple[str, ...]:
    """Entries of an open vocabulary that records of ``split`` may use."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {SPLITS}")
    sources: dict[str, Sequence[str]] = {
        "first": list(PersonProvider.first_names),
        "last": list(PersonProvider.last_names),
        "city_suffix": list(AddressProvider.city_suffixes),
        "street_suffix": list(AddressProvider.street_suffixes),
        "company_suffix": list(CompanyProvider.company_suffixes),
        "word": [w for w in LoremProvider.word_list if len(w) > 2],
    }
    entries = sorted(set(sources[name]))
    if name.endswith("suffix"):  # closed vocabularies are shared
        return tuple(entries)
    return tuple(e for i, e in enumerate(entries) if (i % _HELD_OUT == 0) == (split == "test"))


def known_names(name: str) -> frozenset[str]:
    """A vocabulary's entries of either split, in lower case."""
    return frozenset(n.lower() for split in ("train", "test") for n in vocabulary(name, split))


def pick(rng: random.Random, name: str, split: str) -> str:
    words = vocabulary(name, split)
    word = words[int(rng.random() * len(words))]
    if split != "coined" or name.endswith("suffix") or rng.random() < 0.5:
        return word
    other = words[int(rng.random() * len(words))]
    return word[: rng.randint(1, len(word))] + other[rng.randint(0, len(other) - 1) :].lower()


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choices(string.digits, k=n))


def code(rng: random.Random, n: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase + string.digits, k=n))


def person(rng: random.Random, split: str) -> str:
    return f"{pick(rng, 'first', split)} {pick(rng, 'last', split)}"


def titled(title: str) -> Sampler:
    return lambda rng, split: f"{title} {pick(rng, 'last', split)}"


def ssn(rng: random.Random, split: str) -> str:
    """A syntactically valid number; areas of 900 and above are never issued."""
    if rng.random() < 0.06:
        return f"CANARY_SSN_{code(rng, 8)}"
    value = f"{rng.randint(900, 999)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
    if rng.random() < 0.5:
        area = rng.choice([n for n in range(100, 900) if n != 666])
        value = f"{area}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
        if not us_ssn.is_valid(value):
            return ssn(rng, split)
    return value


def address(rng: random.Random, split: str) -> str:
    number, name = rng.randint(1, 9999), pick(rng, "last", split)
    street = f"{number} {name} {pick(rng, 'street_suffix', split)}"
    if rng.random() < 0.3:
        street += f" Apt. {rng.randint(1, 999)}"
    city = f"{pick(rng, 'last', split)}{pick(rng, 'city_suffix', split)}"
    state = rng.choice(("ID", "AR", "WI", "MS", "ME", "AP", "UT", "KS", "NC", "TX", "CA", "NY"))
    return f"{street}, {city}, {state} {digits(rng, 5)}"


def phone(rng: random.Random, split: str) -> str:
    if rng.random() < 0.4:
        return f"555-{digits(rng, 4)}"
    return f"({rng.randint(200, 989)}) 555-{digits(rng, 4)}"


def email(rng: random.Random, split: str) -> str:
    first, last = pick(rng, "first", split).lower(), pick(rng, "last", split).lower()
    local = rng.choice((f"{first[0]}{last}", f"{first}{last}", f"{last}{digits(rng, 2)}"))
    host = rng.choice(("example.com", "example.org", "example.net"))
    return f"{local}@{host}"


def prefixed(prefix: str, n: int) -> Sampler:
    return lambda rng, split: f"{prefix}-{digits(rng, n)}"


def case_number(rng: random.Random, split: str) -> str:
    if rng.random() < 0.1:
        return f"CANARY_CASE_{code(rng, 8)}"
    return f"CASE-{rng.randint(2018, 2026)}-{digits(rng, 5)}"


def account_number(rng: random.Random, split: str) -> str:
    """An IBAN with valid check digits, a Luhn-valid card number, or a bank's own format."""
    kind = rng.random()
    if kind < 0.34:
        body = digits(rng, 12)
        body += f"{sum(map(int, body)):02}"[-2:]  # a sort code and eight digits: fourteen in all
        return iban.format("GB" + iban.calc_check_digits("GB00WEST" + body) + "WEST" + body, "")
    if kind < 0.67:
        stem = "4" + digits(rng, 14)
        return stem + luhn.calc_check_digit(stem)
    return f"{rng.randint(100000000, 999999999)}-{digits(rng, 8)}"


def routing_number(rng: random.Random, split: str) -> str:
    """Nine digits with the ABA check digit."""
    stem = digits(rng, 8)
    total = sum(w * int(d) for w, d in zip((3, 7, 1, 3, 7, 1, 3, 7), stem, strict=True))
    return stem + str(-total % 10)


def insurance_id(rng: random.Random, split: str) -> str:
    stem = digits(rng, 7)
    return f"INS-{stem}{luhn.calc_check_digit(stem)}"


def last4(rng: random.Random, split: str) -> str:
    return f"****{digits(rng, 4)}"


def date(first_year: int, last_year: int) -> Sampler:
    return lambda rng, split: (
        f"{rng.randint(first_year, last_year)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    )


def money(low: int, high: int, cents: bool = False) -> Sampler:
    """Half of the amounts are round thousands, half are not."""

    def sample(rng: random.Random, split: str) -> str:
        value = rng.randint(low, high)
        if value > 10_000 and rng.random() < 0.5:
            value -= value % 1000
        return f"{value}.00" if cents else str(value)

    return sample


def integer(low: int, high: int) -> Sampler:
    return lambda rng, split: str(rng.randint(low, high))


def company(rng: random.Random, split: str) -> str:
    a, b, c = (pick(rng, "last", split) for _ in range(3))
    suffix = pick(rng, "company_suffix", split)
    return rng.choice((f"{a} {suffix}", f"{a}-{b}", f"{a}, {b} and {c}"))


def choice(options: Sequence[str]) -> Sampler:
    return lambda rng, split: options[int(rng.random() * len(options))]


def some_of(options: Sequence[str], low: int, high: int) -> Sampler:
    return lambda rng, split: ", ".join(rng.sample(list(options), rng.randint(low, high))) or "None"


def phrase(*parts: Sequence[str]) -> Sampler:
    """One entry of every part, joined by spaces: many phrases from short lists."""
    return lambda rng, split: " ".join(rng.choice(p) for p in parts)


def anything(rng: random.Random, split: str) -> str:
    """A value of a random kind, for fields that no schema knows."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(pick(rng, "word", split) for _ in range(rng.randint(1, 4)))
    if kind < 0.4:
        return code(rng, rng.randint(4, 9))
    if kind < 0.5:
        return f"CANARY_{pick(rng, 'word', split).upper()}_{code(rng, 8)}"
    samplers = (person, company, date(1950, 2026), money(100, 400000), email, phone, address)
    return samplers[int(rng.random() * len(samplers))](rng, split)
