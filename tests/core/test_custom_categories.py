"""A policy's own categories: what belongs to one is found in every spelling, or refused aloud."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.agents.scenarios.respell import SPELLINGS
from lcguard.custom_categories import CustomCategory, SearchError, find_custom
from lcguard.normalise import unwrapped
from lcguard.value_search import Spellings

TERMS = (
    "Blue Heron",
    "Grey Fox",
    "Zoë",
    "Ox",
    "Straße 9",
    "C++",
    "日本",
    "R2-D2",
    "Élan Vital",
    "Kite",
)
CATEGORY = CustomCategory(terms=TERMS, patterns=(r"PRJ-\d{4}",))
OF_PATTERNS = ("as written", "upper", "lower", "NFD", "wide", "dashes", "line break", "unseen")


def found(text: str, category: CustomCategory = CATEGORY) -> list[str]:
    return [text[a:b] for a, b in category.find(Spellings(text))]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_term_is_found_in_every_spelling(term: str, spelling: str) -> None:
    if spelling == "no separators" and term == "C++":
        return  # of its signs nothing is left
    written = SPELLINGS[spelling](random.Random(2), term)
    assert len(found(f"We call it {written}, and go on.")) == 1, written


@pytest.mark.parametrize("spelling", OF_PATTERNS)
def test_a_pattern_is_found_as_it_reads(spelling: str) -> None:
    written = SPELLINGS[spelling](random.Random(2), "PRJ-2041")
    (only,) = found(f"Ticket {written} is open.")
    assert only == written


def test_what_json_escapes_is_read() -> None:
    text = r'{"a": "code\nOx, PRJ-\u0032041 and Blue\u00a0Heron"}'
    assert found(text) == ["Ox", r"PRJ-\u0032041", r"Blue\u00a0Heron"]


@pytest.mark.parametrize("word", ["box", "oxen", "Óxide", "kites", "o\u200bxen", "zoës", "foxOx"])
def test_a_short_term_is_found_as_a_word_alone(word: str) -> None:
    assert found(f"a {word} b") == []
    assert found(f"a {word} OX b") == ["OX"]


def test_a_long_term_is_found_inside_words() -> None:
    assert found("TheBlueHerons") == ["BlueHeron"]


letters = st.text(st.sampled_from("abOXox1é\u0301 \n\u00a0\u200b-,.\uff10"), max_size=12)


@given(letters, st.sampled_from(TERMS), st.sampled_from(sorted(SPELLINGS)), letters, st.integers())
def test_whatever_stands_around_it(
    before: str, term: str, spelling: str, after: str, seed: int
) -> None:
    if spelling == "no separators" and term == "C++":
        return
    written = SPELLINGS[spelling](random.Random(seed), term)
    text = f"{before} , {written} , {after}"
    start = len(before) + 3
    # what is covered leaves nothing of it to be found
    ranges = CATEGORY.find(Spellings(text))
    assert ranges == sorted(ranges)
    assert all(a < b for a, b in ranges)
    left = "".join(" , " if any(a <= i < b for a, b in ranges) else c for i, c in enumerate(text))
    assert any(a < start + len(written) and start < b for a, b in ranges)
    assert found(left, CustomCategory(terms=(term,))) == []


@given(st.text(st.sampled_from("ab \n\r\u2028\u00a0\u200bé\uff11"), max_size=20))
def test_joined_lines_map_back(text: str) -> None:
    form = unwrapped(text)
    assert all(0 <= a < b <= len(text) for a, b in zip(form.starts, form.ends, strict=True))
    assert not any(c in form.text for c in "\n\r\u2028")
    kept = [c for c in unicodedata.normalize("NFKC", form.text) if not c.isspace()]
    seen = unicodedata.normalize("NFKC", text.replace("\u200b", ""))
    assert kept == [c for c in seen if not c.isspace()]


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcguard.custom_categories.PATTERN_S", 0.05)
    slow = CustomCategory(patterns=("ok", "(a|aa)+$"))
    with pytest.raises(SearchError, match=r"categories\.x\.patterns\[1\] took longer") as caught:
        find_custom(Spellings("secret " + "a" * 60 + "b"), {"x": slow})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("pattern", "why"), [("(?=b)", "a place"), (r"\s", "white space alone")])
def test_a_pattern_that_hides_nothing_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(SearchError, match=why):
        found("a b", CustomCategory(patterns=(pattern,)))


def test_a_definition_is_not_shown() -> None:
    assert "Heron" not in repr(CATEGORY)
    assert "PRJ" not in str(CATEGORY)
    assert CATEGORY.size == {"terms": 10, "patterns": 1}
    other = CustomCategory(terms=TERMS[::-1], patterns=CATEGORY.patterns)
    assert other.digest == CATEGORY.digest
    assert CustomCategory(terms=TERMS[1:]).digest != CATEGORY.digest
    assert CATEGORY.covers(CustomCategory(terms=TERMS[1:]))
    assert not CustomCategory(terms=TERMS[1:]).covers(CATEGORY)
