"""The user's own records: what the reader makes of them, and one-line errors with the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.agents.scenarios.jsonl import read_jsonl
from lcguard.agents.scenarios.lines import ScenarioError
from lcguard.agents.scenarios.types import hops_of
from lcguard.categories import CATEGORIES

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
    assert first.edge.forbid == CATEGORIES
    assert [(s.field, s.value) for s in first.record.spans] == [("payer", "Ann Lee")]
    assert [(s.field, s.value) for s in second.record.spans] == [("person", "Ann")]
    assert [first.is_task(q) for q in first.record.questions] == [True, False]
    assert [first.is_secret(s) for s in first.record.spans] == [True]


def test_narrower_policy_leaves_other_categories_alone(tmp_path: Path) -> None:
    (hop,) = hops_of(read_jsonl(write(tmp_path, GOOD), forbid=["health"]))
    assert hop.edge.forbid == ("health",)
    assert not hop.is_secret(hop.record.spans[0])
    with pytest.raises(ValueError, match=r"forbid = 'healt'.*use some of those"):
        read_jsonl(tmp_path / "mine.jsonl", forbid=["healt"])


def test_offsets_are_characters_not_bytes(tmp_path: Path) -> None:
    line = {"text": "Zoë 😀 Å", "spans": [{"start": 6, "end": 7, "category": "person"}],
            "questions": []}  # fmt: skip
    (hop,) = hops_of(read_jsonl(write(tmp_path, "\ufeff" + json.dumps(line, ensure_ascii=False))))
    assert hop.record.spans[0].value == "Å"


@given(cuts=st.lists(st.integers(0, 26), min_size=2, max_size=8, unique=True))
def test_any_disjoint_spans_are_read(cuts: list[int], tmp_path_factory: Any) -> None:
    cuts = sorted(cuts[: len(cuts) // 2 * 2])
    pairs = [
        (a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if GOOD["text"][a:b].strip()
    ]
    spans = [{"start": a, "end": b, "category": "contact"} for a, b in reversed(pairs)]
    path = write(tmp_path_factory.mktemp("spans"), {**GOOD, "spans": spans})
    (hop,) = hops_of(read_jsonl(path))
    assert [s.value for s in hop.record.spans] == [GOOD["text"][a:b] for a, b in reversed(pairs)]


def span(**change: Any) -> dict[str, Any]:
    return {**GOOD, "spans": [{"start": 0, "end": 7, "category": "person", **change}]}


BAD = {
    "category": (span(category="nam"), r"spans\[0\].category = 'nam': unknown category; use one "
                 r"of person, government_id, .*confidential"),
    "order": (span(start=7), r"spans\[0\]: start 7 is not before end 7; end is exclusive"),
    "negative": (span(start=-1), r"spans\[0\].start = -1"),
    "beyond": (span(end=99), r"spans\[0\].end = 99: the text has 26 characters; use at most 26"),
    "blank": (span(start=7, end=8), r"spans\[0\]: covers white space alone"),
    "text for number": (span(start="0"), r"spans\[0\].start = '0': "),
    "overlap": ({**GOOD, "spans": [{"start": 4, "end": 9, "category": "person"},
                                   {"start": 0, "end": 7, "category": "person"}]},
                r"spans\[0\].start = 4: overlaps spans\[1\], which ends at 7; split or merge"),
    "missing": ({"text": "a", "spans": []}, r"questions: missing; add `questions: ...`"),
    "unknown key": ({**GOOD, "span": []}, r"span = \[\]: unknown key; .*spans"),
    "question category": ({**GOOD, "questions": [{"question": "a", "answer": "b",
                                                  "category": "x"}]},
                          r"questions\[0\].category = 'x': unknown category"),
    "empty answer": ({**GOOD, "questions": [{"question": "a", "answer": ""}]},
                     r"questions\[0\].answer = ''"),
    "no object": ("3", "3: .*dictionary"),
    "no JSON": ('{"text": ', r"column \d+: .*write one JSON object on one line"),
    "deep": ("[" * 100_000, "write a plain JSON object"),
}  # fmt: skip


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
