"""What guard ``redact`` covers, in every kind of tokenizer and every spelling."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lcguard import normalise
from lcguard.agents.scenarios.respell import SPELLINGS, respell
from lcguard.detokenize import TokenText, TokenTextError, TokenTexts
from lcguard.handoff.redaction import Redaction, RedactionError, redact
from tests.small_tokenizers import KINDS, tokenizer

NAME, SSN = "Zoë Müller", "912-55-1029"
SENTENCE = "The patient {} came in with back pain."


def covered(kind: str, text: str, *secrets: str, **more: Any) -> tuple[Redaction, str]:
    """What is covered of a text, and what of it can still be read."""
    made = tokenizer(kind)
    ids = made(text)["input_ids"]
    found = redact(TokenTexts(made).of(ids), ids, made, secrets, **more)
    left = [i for i in range(len(ids)) if not any(a <= i < b for a, b in found.spans)]
    return found, made.decode([ids[i] for i in left])


def letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAME, SSN])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_named_secret_is_covered_in_every_spelling(kind: str, value: str, spelling: str) -> None:
    written = SPELLINGS[spelling](random.Random(1), value)
    text = SENTENCE.format(written) + f" {value}, again."
    if kind == "Unigram" and tokenizer(kind).unk_token_id in tokenizer(kind)(text)["input_ids"]:
        with pytest.raises(TokenTextError, match="does not know"):
            covered(kind, text, value)  # the others have a token for every byte
        return
    found, left = covered(kind, text, value)
    assert found.n_occurrences == 2
    assert "1029" not in letters(left)
    assert "müll" not in letters(left)
    assert "mull" not in letters(left)
    assert "back pain" in left


@pytest.mark.parametrize("kind", KINDS)
def test_every_occurrence_is_covered_and_counted(kind: str) -> None:
    text = "Ann sat, ann: ANN; Annabel and JoAnn. " + "Call 912551029 or 912 55 1029. " * 3
    found, left = covered(kind, text, "Ann", SSN)
    assert found.n_occurrences == 11
    assert "ann" not in letters(left)
    assert "912" not in left
    assert "Call" in left


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_give_the_text_back(kind: str) -> None:
    made = tokenizer(kind)
    text = "Ada Long: 912-55-1029, back pain"
    ids = made(text)["input_ids"]
    found = TokenTexts(made).of([*ids, *made("</s>")["input_ids"], *ids])
    assert letters(found.text) == 2 * letters(text)
    at = found.text.index("1029")
    ((start, end),) = found.tokens([(at, at + 4)])
    assert "1029" in made.decode(ids[start:end])
    assert "pain" not in made.decode(ids[start:end])
    assert "Long" not in made.decode(ids[start:end])


@pytest.mark.parametrize("kind", ["byte-level BPE", "Metaspace BPE", "Unigram with bytes"])
def test_a_character_of_several_tokens_is_covered_whole(kind: str) -> None:
    found, left = covered(kind, "x 日本 y 日 z", "日本", "日")
    assert found.n_occurrences == 2
    assert left.split() == ["x", "y", "z"]
    assert sum(b - a for a, b in found.spans) >= 8


def test_special_tokens_inside_a_value_hide_nothing_and_stay() -> None:
    made = tokenizer("Metaspace BPE")
    halves = [made(part, add_special_tokens=False)["input_ids"] for part in ("912-55-", "1029")]
    ids = [1, *halves[0], 2, *halves[1]]
    found = redact(TokenTexts(made).of(ids), ids, made, [SSN])
    assert found.n_occurrences == 1
    assert not any(a <= len(halves[0]) + 1 < b for a, b in found.spans)


def test_a_secret_that_is_nowhere_is_refused_without_being_shown() -> None:
    for secret in ("4711-secret", " \n"):
        with pytest.raises(RedactionError) as refused:
            covered("byte-level BPE", "nothing here", secret)
        assert "secrets[0]" in str(refused.value)
        assert "4711" not in str(refused.value)


def test_what_is_detected_once_is_covered_everywhere() -> None:
    text = f"SSN {SSN}, by phone she said 912 551 029."
    found, left = covered(
        "byte-level BPE", text, detect=lambda t: [(t.index(SSN), t.index(SSN) + len(SSN))]
    )
    assert found.n_occurrences == 2
    assert "029" not in left


def test_a_value_that_could_still_be_read_is_refused() -> None:
    """As if the way back from characters to tokens were wrong."""
    made = tokenizer("byte-level BPE")
    ids = made(f"SSN {SSN}")["input_ids"]
    right = TokenTexts(made).of(ids)
    wrong = TokenText(right.text, ((0, 1), *((0, 0) for _ in right.ranges[1:])))
    with pytest.raises(RedactionError, match="still be read"):
        redact(wrong, ids, made, [SSN])


@pytest.mark.parametrize("ids", [[5, 10**6], [-1], [2**70]])
def test_numbers_that_are_no_tokens_are_refused(ids: list[int]) -> None:
    with pytest.raises(TokenTextError):
        TokenTexts(tokenizer("byte-level BPE")).of(ids)


def test_signs_of_a_password_are_covered_with_it() -> None:
    _, left = covered(
        "byte-level BPE", "password: ~#P@$$w0rd!!, PIN $$$-!!-7, a 7", "#p@$$W0RD!!", "$$$-!!-7"
    )
    assert left.replace(" ", "") == "password:~,PIN,a7"


def test_time_is_linear_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that are compared, not in seconds."""
    looked = 0
    real = normalise._clusters

    def counting(text: str) -> Any:
        nonlocal looked
        looked += len(text)
        return real(text)

    monkeypatch.setattr(normalise, "_clusters", counting)
    per_token = []
    for n in (200, 800):
        looked = 0
        text = f"SSN {SSN} of Ann. " * n
        ids = tokenizer("Metaspace BPE")(text)["input_ids"]
        covered("Metaspace BPE", text, SSN, "Ann")
        per_token.append(looked / len(ids))
    assert per_token[1] < 1.05 * per_token[0]


@pytest.mark.parametrize("value", ["aa", "a" * 99, "ab" * 40])
def test_a_value_that_overlaps_itself_is_covered_as_one_place(value: str) -> None:
    text = f"x {value[:2] * 300} y {value} z"
    found, left = covered("byte-level BPE", text, *(value[:n] for n in range(2, len(value) + 1)))
    assert found.n_occurrences == 2
    assert left.split() == ["x", "y", "z"]


def test_many_detected_values_are_covered_everywhere() -> None:
    numbers = [str(100_003 * i) for i in range(5, 90)]
    text = " ".join(f"{n[:3]}-{n[3:]} and {n};" for n in numbers)
    found, left = covered(
        "byte-level BPE",
        text,
        detect=lambda t: [(t.index(f" {n};") + 1, t.index(f" {n};") + 1 + len(n)) for n in numbers],
    )
    assert found.n_occurrences == 2 * len(numbers)
    assert not any(c.isdigit() for c in left)


def test_random_spellings_of_random_values() -> None:
    rng = random.Random(7)
    for _ in range(100):
        value = "".join(rng.choice("abcdéÜß 0123456789-") for _ in range(8)).strip("- ") + "7x"
        written = respell(rng, value)
        _, left = covered("byte-level BPE", f"one {written} two", value)
        assert "7x" not in letters(left)
