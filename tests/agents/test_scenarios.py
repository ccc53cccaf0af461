"""The generator: reproducible, valid, varied; and loading hops from any source."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import luhn
from stdnum.iso7064 import mod_97_10

from lcguard.agents.scenarios import phrasing, values
from lcguard.agents.scenarios.forms import ALL_FORMS
from lcguard.agents.scenarios.generator import (
    GeneratorConfig,
    choose_fields,
    make_record,
    make_scenario,
)
from lcguard.agents.scenarios.load import load_hops, split_hops
from lcguard.agents.scenarios.schema import BY_NAME, RECORD_TYPES, FieldType
from lcguard.agents.scenarios.types import EdgeSpec, Hop, Question, Record, Span, hops_of
from lcguard.categories import CATEGORIES
from lcguard.rule import Rule

SCENARIOS = [make_scenario(GeneratorConfig(), i) for i in range(150)]
HOPS = hops_of(SCENARIOS)
seeds = st.integers(0, 10**6)


def field_of(record: Record, name: str) -> FieldType | None:
    return next((f for f in BY_NAME[record.record_type].fields if f.name == name), None)


@given(seed=seeds, index=st.integers(0, 1000), split=st.sampled_from(("train", "test")))
@settings(max_examples=20)
def test_same_seed_same_scenario(seed: int, index: int, split: str) -> None:
    config = GeneratorConfig(seed=seed, split=split)
    assert make_scenario(config, index) == make_scenario(config, index)


def test_seed_split_and_index_each_change_the_scenario() -> None:
    base = make_scenario(GeneratorConfig(), 0).agents[0].records[0].text
    others = [
        make_scenario(GeneratorConfig(seed=1), 0),
        make_scenario(GeneratorConfig(split="test"), 0),
        make_scenario(GeneratorConfig(), 1),
    ]
    texts = [s.agents[0].records[0].text for s in others]
    assert len({base, *texts}) == 4


@pytest.mark.parametrize("form", ALL_FORMS)
def test_every_layout_holds_the_same_fields(form: str) -> None:
    texts = set()
    for i in range(40):
        (plain, *_), (hop, *_) = (
            hops_of([make_scenario(GeneratorConfig(seed=i, forms=(f,)), 0)]) for f in ("note", form)
        )
        texts.add(hop.record.text)
        # a record checks that its spans read their values
        assert {s.value for s in hop.record.spans} == {s.value for s in plain.record.spans}
        assert all(
            hop.record.text.count(q.answer) or q.kind != "direct" for q in hop.record.questions
        )
    assert len(texts) == 40


def test_tool_results_are_json() -> None:
    for i in range(40):
        record = hops_of([make_scenario(GeneratorConfig(seed=i, forms=("json",)), 0)])[0].record
        assert {s.value for s in record.spans} <= set(json.loads(record.text).values())


def test_several_layouts_take_turns_and_unknown_ones_are_refused() -> None:
    hops = load_hops("generator", seed=1, n=60, forms=("json", "mail"))
    kinds = {h.record.text.startswith("From: ") for h in hops}
    assert kinds == {True, False}
    with pytest.raises(ValueError, match=r"forms = \['poem'\]: use one or more of note, json"):
        load_hops("generator", n=2, forms=("poem",))


@pytest.mark.parametrize("name", ["first", "last", "word"])
def test_train_and_test_vocabularies_are_disjoint(name: str) -> None:
    train, test = (set(values.vocabulary(name, s)) for s in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_no_person_of_a_test_record_is_one_of_train() -> None:
    def people(split: str) -> set[str]:
        hops = load_hops("generator", split=split, n=80)
        return {s.value for h in hops for s in h.record.spans if s.category == "person"}

    assert people("test")
    assert not people("train") & people("test")


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'dev' is unknown; use one of"):
        values.vocabulary("first", "dev")


@given(seed=seeds)
@settings(max_examples=30)
def test_spans_read_what_they_say_and_do_not_overlap(seed: int) -> None:
    record = make_record(random.Random(seed), GeneratorConfig(), "r")
    end = 0
    for span in record.spans:
        assert record.text[span.start : span.end] == span.value
        assert span.value
        assert span.start >= end
        end = span.end


def test_record_refuses_a_span_that_reads_something_else() -> None:
    with pytest.raises(ValueError, match="record r: span name at 0:3 reads 'Ann', not 'Bob'"):
        Record("r", "t", "v", "Ann", (Span(0, 3, "name", "person", "Bob"),), ())


@given(seed=seeds)
def test_identifiers_have_valid_check_digits(seed: int) -> None:
    rng = random.Random(seed)
    number = values.account_number(rng, "train")
    if number.startswith("GB"):
        assert mod_97_10.is_valid(number[4:] + number[:4])  # the IBAN rule
    elif "-" not in number:
        assert luhn.is_valid(number)
    assert luhn.is_valid(values.insurance_id(rng, "train").removeprefix("INS-"))
    routing = [int(d) for d in values.routing_number(rng, "train")]
    assert len(routing) == 9
    weighted = sum(w * d for w, d in zip((3, 7, 1) * 3, routing, strict=True))
    assert weighted % 10 == 0  # the ABA rule
    ssn = values.ssn(rng, "train")
    assert re.fullmatch(r"\d{3}-\d{2}-\d{4}|CANARY_SSN_[A-Z0-9]{8}", ssn)


def test_derived_answers_follow_from_the_values() -> None:
    seen = set()
    for hop in HOPS:
        spans = {s.field: s for s in hop.record.spans}
        for question in hop.record.questions:
            if question.kind != "derived":
                continue
            span, field = spans[question.field], field_of(hop.record, question.field)
            assert field is not None
            assert field.band is not None
            assert question.answer == span.band == field.band(span.value)
            seen.add(question.answer)
    assert {"low", "medium", "moderate", "high", "senior", "yes", "no"} <= seen


def test_questions_ask_for_every_value_and_for_absent_fields() -> None:
    for hop in HOPS:
        direct = {q.field: q.answer for q in hop.record.questions if q.kind == "direct"}
        assert direct == {s.field: s.value for s in hop.record.spans}
        absent = [q for q in hop.record.questions if q.kind == "absent"]
        assert len(absent) <= 1
        assert all(q.answer == phrasing.ABSENT and q.field not in direct for q in absent)


def test_one_to_four_agents_in_a_chain_that_ends_at_the_requester() -> None:
    assert {len(s.agents) for s in SCENARIOS} == {1, 2, 3, 4}
    for s in SCENARIOS:
        assert [e.source for e in s.edges] == [a.name for a in s.agents]
        assert [e.audience for e in s.edges] == [*(a.name for a in s.agents[1:]), "requester"]
        assert all(len(a.records) == 1 for a in s.agents)
    assert len({h.record.record_id for h in HOPS}) == len(HOPS)


def test_all_verticals_categories_and_record_types_occur() -> None:
    assert {s.vertical for s in SCENARIOS} == {"healthcare", "finance", "legal", "corporate"}
    assert {h.record.record_type for h in HOPS} == set(BY_NAME)
    spans = [s for h in HOPS for s in h.record.spans]
    assert {s.category for s in spans} == {None, *CATEGORIES}


@pytest.mark.parametrize("kind", RECORD_TYPES, ids=lambda k: k.name)
@given(seed=seeds, wanted=st.integers(2, 7))
@settings(max_examples=15)
def test_a_record_holds_a_secret_and_a_task_field(kind, seed: int, wanted: int) -> None:
    fields = choose_fields(random.Random(seed), kind, wanted, wanted)
    assert len({f.name for f in fields}) == min(wanted, len(kind.fields))
    assert {f.category is None for f in fields} == {True, False}


def test_phrasings_are_many() -> None:
    """No attack may win by knowing one template."""
    shapes, questions = set(), set()
    for hop in HOPS:
        for span in hop.record.spans:
            field = field_of(hop.record, span.field)
            if field is None:
                continue
            line = re.split(r"[.;] |\n", hop.record.text[: span.start])[-1]
            for label in sorted(field.labels, key=len, reverse=True):
                line = re.sub(re.escape(label), "<label>", line, flags=re.IGNORECASE)
            shapes.add(line.replace(BY_NAME[hop.record.record_type].noun, "<noun>"))
        questions |= {q.text for q in hop.record.questions}
    assert len(shapes) >= 8
    assert len(questions) > 200
    assert len({h.record.text.split(".")[0] for h in HOPS}) > 20


def test_policy_decides_what_is_secret_and_what_is_task() -> None:
    for hop in HOPS:
        assert hop.edge_name == f"{hop.edge.source}->{hop.edge.audience}"
        for span in hop.record.spans:
            assert hop.is_secret(span) == (span.category is not None)
        for q in hop.record.questions:
            assert hop.is_task(q) == (q.category is None and q.kind != "absent")


def test_named_fields_overrule_categories() -> None:
    """A task field stays task where a sibling makes its category forbidden."""
    record = Record(
        "r",
        "customer",
        "finance",
        "10 20",
        (Span(0, 2, "balance", "finance", "10"), Span(3, 5, "credit_score", "finance", "20")),
        (
            Question("Balance?", "10", "balance", "finance"),
            Question("Score?", "20", "credit_score", "finance"),
        ),
    )
    hop = Hop("s", EdgeSpec("a", "b", Rule(("finance",))), record, ("balance",), ("credit_score",))
    assert [hop.is_task(q) for q in record.questions] == [True, False]
    assert [hop.is_secret(s) for s in record.spans] == [False, True]


def test_load_hops_of_the_generator() -> None:
    hops = load_hops("generator", seed=3, split="train", n=5, min_fields=2, max_fields=3)
    assert len({h.scenario_id for h in hops}) == 5
    assert all(2 <= len(h.record.spans) <= 4 for h in hops)  # one more may be generic
    assert hops == load_hops("generator", seed=3, split="train", n=5, min_fields=2, max_fields=3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "mapgie", "n": 1}, "source 'mapgie' is unknown: did you mean 'magpie'"),
        ({"source": "generator"}, "pass n"),
        ({"source": "generator", "n": 0}, "n = 0: ask for at least one"),
        ({"source": "generator", "n": 1, "split": "dev"}, "split 'dev' is unknown"),
        ({"source": "generator", "n": 1, "min_fields": 9}, "use 2 <= min <= max"),
        ({"source": "jsonl"}, "pass its path"),
    ],
)
def test_load_hops_refuses(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_hops(**kwargs)


def test_load_hops_draws_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a", "spans": [], "questions": []}\n' * 9)
    drawn = [h.scenario_id for h in load_hops("jsonl", path=path, n=4, seed=1)]
    assert len(set(drawn)) == 4
    assert drawn == sorted(drawn)
    assert drawn == [h.scenario_id for h in load_hops("jsonl", path=path, n=4, seed=1)]
    assert len(load_hops("jsonl", path=path, n=99)) == 9


@given(share=st.floats(0.01, 0.99), seed=seeds)
@settings(max_examples=25)
def test_split_hops_keeps_scenarios_whole(share: float, seed: int) -> None:
    hops = HOPS[:60]
    train, test = split_hops(hops, share, seed)
    assert train
    assert test
    assert not {h.scenario_id for h in train} & {h.scenario_id for h in test}
    assert sorted(h.record.record_id for h in train + test) == sorted(
        h.record.record_id for h in hops
    )
    assert (train, test) == split_hops(hops, share, seed)


def test_split_hops_refuses() -> None:
    with pytest.raises(ValueError, match="train_share = 1: use a share"):
        split_hops(HOPS, 1)
    with pytest.raises(ValueError, match=r"0 scenario\(s\) cannot be split"):
        split_hops([], 0.5)
