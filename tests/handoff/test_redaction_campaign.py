"""No named secret is left in a redacted prompt: any spelling, any place, any tokenizer.

CI runs a share of the cases. All of them:

    LCGUARD_CAMPAIGN=1 pytest tests/handoff/test_redaction_campaign.py
"""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcguard.agents.scenarios.respell import SPELLINGS
from lcguard.detokenize import TokenTextError, TokenTexts
from lcguard.handoff.redaction import redact
from tests.small_tokenizers import KINDS, tokenizer

N = 20_000 if os.environ.get("LCGUARD_CAMPAIGN") else 400
WHOLE = [s for s in SPELLINGS if s not in ("markdown", "code", "in a word")]
"""Spellings that put nothing around a value: places do."""
PLACES = [
    "{}",
    "SSN: {}.",
    "_{}_END",
    "x{}",
    "**{}**",
    "`{}`, and `{}`",
    "| a | {} | b |",
    "{}\n{}",
    "She said: “{}”, twice: {}!",
    '{{"arguments": {{"value": "{}"}}}}',
    "<b>{}</b>",
    "?q={}&r=1",
    "é{}",
    "(日本 {} 🙂)",
    "\u200b{}\u200b",
    "- {}\n- none\n",
    "long words before " * 40 + "{}",
]
_digits = st.integers(100, 10**9).map(str)
_word = st.text(st.sampled_from("abcdefgéüßñoz"), min_size=3, max_size=8)
values = st.one_of(
    st.tuples(st.integers(100, 999), st.integers(10, 99), st.integers(1000, 9999)).map(
        lambda t: f"{t[0]}-{t[1]}-{t[2]}"
    ),
    st.tuples(_word, _word).map(lambda t: f"{t[0].title()} {t[1].title()}"),
    st.tuples(_word, _word, _digits).map(lambda t: f"{t[0]} {t[1]} {t[2]}"),
    st.tuples(_word, _digits).map(lambda t: f"{t[0]}-{t[1]}"),
    _digits,
    st.tuples(_word, _word).map(lambda t: f"{t[0]}.{t[1]}@example.org"),
    st.text(st.characters(categories=("L", "N"), max_codepoint=0x24FF), min_size=4, max_size=9),
)
cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "value": values,
        "place": st.sampled_from(PLACES),
        "spelling": st.sampled_from(WHOLE),
        "seed": st.integers(0, 2**32),
        "pieces": st.booleans(),
    }
)
seen: Counter[str] = Counter()


def key(text: str) -> str:
    """The test's own idea of what makes a value: letters and digits, in any case and width."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in text if c.isalnum())


def prompt(case: dict[str, Any]) -> tuple[list[int], set[int]]:
    """Tokens, and which of them hold a letter or digit of the value.

    In ``pieces`` the value's tokens are its own, as in a prompt of tokens that a client cut;
    otherwise the whole text is split, and the tokenizer says what comes from where.
    """
    rng = random.Random(case["seed"])
    written = SPELLINGS[case["spelling"]](rng, case["value"])
    parts = case["place"].replace("{{", "{").replace("}}", "}").split("{}")
    texts = [parts[0]]
    for part in parts[1:]:
        texts += written, part
    if not case["pieces"]:
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        return tokens(
            case["kind"],
            "".join(texts),
            [(starts[i], starts[i + 1]) for i in range(1, len(texts), 2)],
        )
    ids: list[int] = []
    held: set[int] = set()
    for i, text in enumerate(texts):
        more, own = tokens(case["kind"], text, [(0, len(text))] if i % 2 else [])
        held |= {len(ids) + j for j in own}
        ids += more
    return ids, held


def tokens(kind: str, text: str, inside: list[tuple[int, int]]) -> tuple[list[int], set[int]]:
    """Tokens of a text, and which of them hold a letter or digit from ``inside``."""
    made = tokenizer(kind)
    found = made(text, return_offsets_mapping=True)
    names = made.convert_ids_to_tokens(found["input_ids"])
    return found["input_ids"], {
        j
        for j, (a, b) in enumerate(found["offset_mapping"])
        # the space that Metaspace puts first is said to come from the first letter, and each byte
        # of several characters that Unigram does not know from all of them
        if names[j].strip("▁")
        and not (kind == "Unigram with bytes" and names[j].startswith("<0x"))
        and any(c.isalnum() for s, e in inside for c in text[max(a, s) : min(b, e)])
    }


@cache
def texts(kind: str) -> TokenTexts:
    return TokenTexts(tokenizer(kind))


@settings(
    max_examples=N,
    deadline=None,
    derandomize=N > 400,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(cases)
def check(case: dict[str, Any]) -> None:
    made = tokenizer(case["kind"])
    ids, held = prompt(case)
    if case["kind"] == "Unigram" and made.unk_token_id in ids:
        with pytest.raises(TokenTextError):  # the others have a token for every byte
            texts(case["kind"]).of(ids)
        seen["refused"] += 1
        return
    found = redact(texts(case["kind"]).of(ids), ids, made, [case["value"]])
    covered = {i for a, b in found.spans for i in range(a, b)}
    assert not held - covered, json.dumps(case)
    left: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        if i in covered:
            left.append([])
        else:
            left[-1].append(token)
    assert not any(key(case["value"]) in key(made.decode(run)) for run in left)
    seen["covered"] += 1


def test_no_named_secret_is_left_in_a_redacted_prompt() -> None:
    seen.clear()
    check()
    print(dict(seen))  # for whoever runs all of them, with -s
    assert sum(seen.values()) >= N
    assert seen["covered"] > 0.8 * N
