"""What ``detect: presidio`` finds, and for what it vouches."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from faker import Faker
from faker.config import AVAILABLE_LOCALES

from lcguard.agents.scenarios.respell import SPELLINGS, respell
from lcguard.categories import CATEGORIES
from lcguard.server.detection import detector as module
from lcguard.server.detection.detector import OVERLAP, RECALL, WINDOW, Detector, vouched

pytestmark = pytest.mark.filterwarnings("ignore")
SSN = "912-55-1029"


@cache
def detector() -> Detector:
    pytest.importorskip("presidio_analyzer")
    return Detector()


def missed(text: str, value: str, category: Any = "government_id") -> str:
    """Letters and digits of the value that are not covered."""
    found, at = detector().find(text, (category,)), text.index(value)
    return "".join(
        text[i]
        for i in range(at, at + len(value))
        if text[i].isalnum() and not any(a <= i < b for a, b in found)
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_number_is_found_in_every_spelling(spelling: str) -> None:
    written = SPELLINGS[spelling](random.Random(3), SSN)
    assert not missed(f"She is 41. Her number, {written}, is on file.", written)


@pytest.mark.parametrize(
    "written",
    [
        f"SSN_{SSN}_END",
        "9 1 2 - 5 5 - 1 0 2 9",
        "912-55-\n1029",
        "912\n55\n1029",
        "**912**-55-__1029__",
        "912.55.1029",
        "912/55/1029",
        "(912) 55-1029",
        "9l2-55-lO29",
    ],
)
def test_a_number_is_found_however_it_is_marked_up_or_broken(written: str) -> None:
    assert not missed(f"number: {written}, on file", written)


def test_numbers_of_other_countries_are_found() -> None:
    rng = random.Random(5)
    for locale in sorted(AVAILABLE_LOCALES):
        fake = Faker(locale)
        fake.seed_instance(2)
        for made in (fake.ssn(), fake.passport_number()):
            for written in (made, respell(rng, made)):
                assert not missed(f"Number {written} was shown.", written), (locale, written)


@pytest.mark.parametrize(
    "text",
    [
        "born 1987-05-12, seen on 12/05/1987 and on May 12, 1987",
        "at 2026-01-31T08:30:00Z, room 1204, aged 41",
        "costs $180,000.00 or 95000 a year",
        "chief complaint: back pain since March 2021; take 2 x 500 mg",
    ],
)
def test_dates_times_and_amounts_are_no_numbers_of_a_government(text: str) -> None:
    assert detector().find(text, ("government_id",)) == []


def test_a_number_that_ends_like_a_date_is_found_whole() -> None:
    for written in ("912-55-1987-05-12", "19870512-1234", "120587-1234"):
        assert not missed(f"number {written}.", written)


def test_a_long_text_is_looked_through_in_pieces() -> None:
    for at in (0, WINDOW - OVERLAP - 5, WINDOW - 5, WINDOW, 3 * WINDOW + 7):
        text = "word " * (4 * WINDOW // 5)
        text = f"{text[:at]} zoe@example.org {text[at:]}"
        assert not missed(text, "zoe@example.org", "contact")


def test_a_detector_vouches_for_what_its_recall_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vouched("none") == vouched("presidio") == ()
    assert {c for row in RECALL.values() for c in row} < set(CATEGORIES)
    good: Any = {"a": {"account": (990, 1000)}, "b": {"account": (2000, 2001)}}
    for row, expected in (((2000, 2001), ("account",)), ((20, 20), ()), ((990, 1000), ())):
        monkeypatch.setattr(module, "RECALL", good | {"a": {"account": row}})
        assert vouched("presidio") == expected
    monkeypatch.setattr(module, "RECALL", {})
    assert vouched("presidio") == ()
