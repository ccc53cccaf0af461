"""The user's own records: what the reader makes of them, and one-line errors with the fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.agents.backends.hf import load_backend
from lcguard.agents.scenarios.files import ScenarioError, ScenarioWarning
from lcguard.agents.scenarios.jsonl import read_jsonl
from lcguard.agents.scenarios.types import hops_of
from lcguard.categories import CATEGORIES
from lcguard.normalise import occurrences
from lcguard.training.twins import neutral_twin

GOOD: dict[str, Any] = {
    "text": "Ann Lee was billed 90 EUR.",
    "spans": [{"start": 0, "end": 7, "category": "person", "field": "payer"}],
    "questions": [
        {"question": "How much was billed?", "answer": "90 EUR"},
        {"question": "Who was billed?", "answer": "Ann Lee", "category": "person", "id": "q2"},
    ],
}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    file = path / "mine.jsonl"
    file.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines),
        encoding="utf-8",
    )
    return file


def test_reads_spans_questions_and_defaults(tmp_path: Path) -> None:
    plain = {**GOOD, "id": "b", "spans": [{"start": 0, "end": 3, "category": "person"}]}
    scenarios = read_jsonl(write(tmp_path, GOOD, "", plain))
    assert [s.scenario_id for s in scenarios] == ["mine-1", "b"]
    first, second = hops_of(scenarios)
    assert first.edge_name == "sender->receiver"
    assert first.edge.rule.forbid == CATEGORIES
    assert [(s.field, s.value) for s in first.record.spans] == [("payer", "Ann Lee")]
    assert [(s.field, s.value) for s in second.record.spans] == [("person", "Ann")]
    assert [first.is_task(q) for q in first.record.questions] == [True, False]
    assert [first.is_secret(s) for s in first.record.spans] == [True]


def test_narrower_policy_leaves_other_categories_alone(tmp_path: Path) -> None:
    (hop,) = hops_of(read_jsonl(write(tmp_path, GOOD), forbid=["health"]))
    assert hop.edge.rule.forbid == ("health",)
    assert not hop.is_secret(hop.record.spans[0])
    with pytest.raises(ValueError, match=r"forbid = 'healt'.*use some of those"):
        read_jsonl(tmp_path / "mine.jsonl", forbid=["healt"])


def test_offsets_are_characters_not_bytes(tmp_path: Path) -> None:
    line = {
        "text": "Zoë 😀 Å",
        "spans": [{"start": 6, "end": 7, "category": "person"}],
        "questions": [],
    }
    (hop,) = hops_of(read_jsonl(write(tmp_path, "\ufeff" + json.dumps(line, ensure_ascii=False))))
    assert hop.record.spans[0].value == "Å"


@pytest.mark.filterwarnings("ignore::lcguard.agents.scenarios.files.ScenarioWarning")
@given(cuts=st.lists(st.integers(0, 26), min_size=2, max_size=8, unique=True))
def test_any_disjoint_spans_are_read(cuts: list[int], tmp_path_factory: Any) -> None:
    cuts = sorted(cuts[: len(cuts) // 2 * 2])
    pairs = [
        (a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if GOOD["text"][a:b].strip()
    ]
    spans = [{"start": a, "end": b, "category": "contact"} for a, b in reversed(pairs)]
    path = write(tmp_path_factory.mktemp("spans"), {**GOOD, "spans": spans})
    (hop,) = hops_of(read_jsonl(path))
    read = [s.value for s in hop.record.spans if s.field != "repeat"]
    assert read == [GOOD["text"][a:b] for a, b in reversed(pairs)]


def span(**change: Any) -> dict[str, Any]:
    return {**GOOD, "spans": [{"start": 0, "end": 7, "category": "person", **change}]}


BAD = {
    "category": (
        span(category="nam"),
        r"spans\[0\].category = 'nam': category 'nam' is unknown: use one "
        r"of person, government_id, .*confidential",
    ),
    "order": (span(start=7), r"spans\[0\]: start 7 is not before end 7; end is exclusive"),
    "negative": (span(start=-1), r"spans\[0\].start = -1"),
    "beyond": (span(end=99), r"spans\[0\].end = 99: the text has 26 characters; use at most 26"),
    "blank": (span(start=7, end=8), r"spans\[0\]: covers white space alone"),
    "other value": (
        span(value="Ann Le"),
        r"spans\[0\]: value is 'Ann Le', the text reads 'Ann "
        r"Lee': the value stands at start 0, end 6, in characters",
    ),
    "value not there": (span(value="Bo"), r"value is 'Bo'.* stands nowhere in it: write it as it"),
    "reserved field": (span(field="repeat"), r"spans\[0\].field = 'repeat': is the name of what"),
    "text for number": (span(start="0"), r"spans\[0\].start = '0': "),
    "overlap": (
        {
            **GOOD,
            "spans": [
                {"start": 4, "end": 9, "category": "person"},
                {"start": 0, "end": 7, "category": "person"},
            ],
        },
        r"spans\[0\].start = 4: overlaps spans\[1\], which ends at 7; split or merge",
    ),
    "missing": ({"text": "a", "spans": []}, r"questions: missing; add `questions: ...`"),
    "unknown key": ({**GOOD, "span": []}, r"span = \[\]: unknown key; .*spans"),
    "question category": (
        {**GOOD, "questions": [{"question": "a", "answer": "b", "category": "x"}]},
        r"questions\[0\].category = 'x': category 'x' is unknown",
    ),
    "empty answer": (
        {**GOOD, "questions": [{"question": "a", "answer": ""}]},
        r"questions\[0\].answer = ''",
    ),
    "no object": ("3", "3: .*dictionary"),
    "no JSON": ('{"text": ', r"column \d+: .*write one JSON object on one line"),
    "deep": ("[" * 100_000, "write a plain JSON object"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_errors_name_file_line_key_and_fix(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, GOOD, line)
    with pytest.raises(ScenarioError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_ids_are_unique(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="2: id = 'a': used before; make it unique"):
        read_jsonl(write(tmp_path, {**GOOD, "id": "a"}, {**GOOD, "id": "a"}))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="No such file or directory; pass a readable file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ScenarioError, match="no records; write one JSON object a line"):
        read_jsonl(write(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(ScenarioError, match="save it as UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")


# -- offsets in other units, and spans beside their value


def line_of(text: str, *spans: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {
        "text": text,
        "questions": [],
        "spans": [{"start": a, "end": b, "category": "government_id", **more} for a, b in spans],
    }


EMOJI = "\U0001f4c9\U0001f4f0 Zoë Long, SSN 912-55-1029, back pain."
"""Two characters of four bytes, and one of two."""


def counted(text: str, value: str, encoding: str, width: int) -> tuple[int, int]:
    """Where ``value`` stands in units of ``width`` bytes of an encoding."""
    start = len(text[: text.index(value)].encode(encoding)) // width
    return start, start + len(value.encode(encoding)) // width


@pytest.mark.parametrize(
    ("encoding", "width", "units"), [("utf-16-le", 2, "UTF-16 units"), ("utf-8", 1, "UTF-8 bytes")]
)
def test_offsets_in_other_units_are_refused(
    encoding: str, width: int, units: str, tmp_path: Path
) -> None:
    at = EMOJI.index("912")
    wrong = counted(EMOJI, "912-55-1029", encoding, width)
    with pytest.raises(ScenarioError, match=rf"in {units} it would be '912-55-1029'") as caught:
        read_jsonl(write(tmp_path, line_of(EMOJI, wrong)))
    assert f"count characters, here start {at} and end {at + 11}" in str(caught.value)
    # whatever they cut, a value tells
    with pytest.raises(ScenarioError, match=f"the value stands at start {at}, end {at + 11}"):
        read_jsonl(write(tmp_path, line_of(EMOJI, wrong, value="912-55-1029")))
    right = line_of(EMOJI, (at, at + 11), value="912-55-1029")
    (hop,) = hops_of(read_jsonl(write(tmp_path, right)))
    assert hop.record.spans[0].value == "912-55-1029"


@pytest.mark.parametrize(
    ("text", "span", "warned"),
    [
        ("SSN 912-55-1029.", (5, 15), True),
        ("SSN 912-55-1029.", (4, 14), True),
        ("SSN 912-55-1029.", (4, 15), False),
        ("Ann Lee", (0, 6), True),
        ("Ann Lee", (0, 4), True),
        ("Zoe\u0308 Long", (0, 3), True),
        ("due: EUR90 now", (8, 10), False),
        ("\u738b\u5c0f\u660e\u7684\u8d26\u53f7", (0, 3), False),
    ],
)
def test_a_span_that_cuts_a_word_is_warned_of(
    text: str, span: tuple[int, int], warned: bool, tmp_path: Path, recwarn: Any
) -> None:
    read_jsonl(write(tmp_path, line_of(text, span)))
    found = [str(w.message) for w in recwarn if "inside a word" in str(w.message)]
    assert len(found) == warned
    assert all("mine.jsonl:1: spans[0] reads " in message for message in found)


# -- values that stand in the text again

AGAIN = [
    ("SSN 912-55-1029. Once more: 912-55-1029.", ["912-55-1029"]),
    ("SSN 912-55-1029. Once more: 912551029.", ["912551029"]),
    ("SSN 912-55-1029. 912\u201155\u20111029.", ["912\u201155\u20111029"]),
    ("SSN 912-55-1029. (9125\u200b51029)", ["9125\u200b51029"]),
    ("SSN 912-55-1029. File_912 55 1029_a", ["912 55 1029"]),
    ("SSN 912-55-1029. Other: 912-55-1030.", []),
]


@pytest.mark.parametrize(("text", "again"), AGAIN)
def test_repeats_are_guarded_and_not_scored(
    text: str, again: list[str], tmp_path: Path, recwarn: Any
) -> None:
    (hop,) = hops_of(read_jsonl(write(tmp_path, line_of(text, (4, 15)))))
    first, *others = hop.record.spans
    assert [s.value for s in others] == again
    assert {s.category for s in others} <= {first.category}
    assert [hop.is_secret(s) for s in hop.record.spans] == [True, *(False for _ in others)]
    said = [str(w.message) for w in recwarn]
    assert len(said) == bool(again)
    assert all("stands there again; guarded like it" in message for message in said)
    # what the twin and guard redact overwrite holds none of it
    (record,) = load_backend("nano").encoder.encode([hop])
    twin = load_backend("nano").decode(neutral_twin(record, CATEGORIES, 0))
    assert occurrences(twin, "912-55-1029") == []


def test_a_short_value_is_repeated_by_a_word_alone(tmp_path: Path) -> None:
    text = "Age 45, room 145, 4.5 km, in 45 days; EUR45. Ann's annual plan: ANN."
    spans = [(4, 6, "person"), (text.index("Ann"), text.index("Ann") + 3, "contact")]
    line = {
        "text": text,
        "questions": [],
        "spans": [{"start": a, "end": b, "category": c} for a, b, c in spans],
    }
    with pytest.warns(ScenarioWarning, match="and 2 more"):
        (hop,) = hops_of(read_jsonl(write(tmp_path, line)))
    places = [(s.start, s.value) for s in hop.record.spans[2:]]
    assert places == [(text.index("45 days"), "45"), (text.index("45. Ann"), "45"), (64, "ANN")]


def test_a_value_within_another_category_is_guarded_as_itself(tmp_path: Path) -> None:
    text = "Ann Lee <ann.lee@example.org>"
    line = {
        "text": text,
        "questions": [],
        "spans": [
            {"start": 0, "end": 7, "category": "person"},
            {"start": 9, "end": 28, "category": "contact"},
        ],
    }
    with pytest.warns(ScenarioWarning, match="characters 9 to 16"):
        (hop,) = hops_of(read_jsonl(write(tmp_path, line), forbid=["person"]))
    (record,) = load_backend("nano").encoder.encode([hop])
    twin = load_backend("nano").decode(neutral_twin(record, ["person"], 0))
    assert occurrences(twin, "Ann Lee") == []


def test_the_command_line_warns_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, *[line_of(AGAIN[0][0], (4, 15)) for _ in range(3)])
    code = (
        "import sys; from pathlib import Path; from lcguard import cli;"
        "from lcguard.agents.scenarios.jsonl import read_jsonl;"
        "cli.app = lambda: read_jsonl(Path(sys.argv[1])); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lcguard: warning: {path}:1: characters 28 to 39: a span's value")
    assert line.endswith("(and 2 more)")
