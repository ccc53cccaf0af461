"""Values are found in every spelling of theirs, at the place where they stand."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.normalise import folded, occurrences, skeleton

SSN = "912-55-1029"


def wide(text: str) -> str:
    """In full-width characters."""
    return "".join(chr(ord(c) + 0xFEE0) for c in text)


@pytest.mark.parametrize(
    "written",
    [
        SSN,
        "912551029",
        "912 55 1029",
        "912\u00a055\u00a01029",
        "912\n55\n1029",
        "912\u201055\u20111029",
        "912\u221255\u22121029",
        "9\u200b12-5\u200b5-1029",
        wide("912") + "-55-" + wide("1029"),
        "912**-55-**1029",
        "912.55/1029",
        "\u0669\u0661\u0662-55-1029",
        "9\ufe0f\u20e31\ufe0f\u20e32\ufe0f\u20e3-55-1029",
        "9\u03361\u03362\u0336-55-1029",
    ],
)
def test_a_number_is_found_however_it_is_separated(written: str) -> None:
    text = f"SSN_{written}_END, then none"
    ((start, end),) = occurrences(text, SSN)
    assert text[start:end] == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("Zoë Müller", "ZOË MÜLLER"),
        ("Zoë Müller", unicodedata.normalize("NFD", "Zoë Müller")),
        ("Zoë Müller", "Zoë  \n\tMüller"),
        ("Zoë Müller", "Zo\u00adë\u200d M\u2060üller"),
        ("Straße 5", "STRASSE 5"),
        ("Zoë Müller", "zoe muller"),
        ("Zoe Muller", "Zoë Müller"),
        ("office", "oﬃce"),
        ("각하", unicodedata.normalize("NFD", "각하")),
    ],
)
def test_a_text_is_found_in_any_case_composition_and_spacing(value: str, written: str) -> None:
    text = f"before {written} after"
    ((start, end),) = occurrences(text, value)
    assert text[start:end] == written


def test_what_is_found_is_whole_characters_and_every_occurrence() -> None:
    assert occurrences("aaaa", "aa") == [(0, 2), (1, 3), (2, 4)]
    assert occurrences("ababab", "abab") == [(0, 4), (2, 6)]
    assert occurrences("Ann, ann; ANN", "Ann") == [(0, 3), (5, 8), (10, 13)]
    assert occurrences("e\u0301", "e") == [(0, 1), (0, 2)]
    assert occurrences("a *** b", "***") == [(2, 5)]
    assert occurrences("nothing here", SSN) == []
    assert occurrences("text", "") == []


def test_folded_text_stays_readable_for_patterns() -> None:
    text = f"SSN{wide(':912')}\u201155\u2212\u200b1029 \n of\u00a0Ann"
    form = folded(text)
    assert form.text == "SSN:912-55-1029 of Ann"
    at = form.text.index("1029")
    start, end = form.origin(at, at + 4)
    assert text[start:end] == "1029"


letters = st.text(st.sampled_from("aAbB1\uff12é\u0301ﬃ -\u2011\u200b각\u1100\u1161"), max_size=14)


@given(letters, st.text(min_size=1, max_size=6), letters)
def test_a_value_is_found_wherever_it_was_put(before: str, value: str, after: str) -> None:
    text = before + value + after
    at = len(before)
    found = occurrences(text, value)
    assert any(start <= at and at + len(value) <= end for start, end in found)
    assert all(0 <= start < end <= len(text) for start, end in found)


@given(letters)
def test_forms_are_normal_and_their_maps_in_order(text: str) -> None:
    assert unicodedata.is_normalized("NFKC", folded(text).text)
    for form in (folded(text), skeleton(text)):
        assert len(form.starts) == len(form.ends) == len(form.text)
        assert list(form.starts) == sorted(form.starts)
        assert all(a < b for a, b in zip(form.starts, form.ends, strict=True))


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=8))
def test_overlaps_are_found_as_by_trying_every_place(text: str, value: str) -> None:
    every = [(i, i + len(value)) for i in range(len(text)) if text.startswith(value, i)]
    assert occurrences(text, value) == every
