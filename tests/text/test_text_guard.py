"""The text guard: what is hidden, where, and that nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lcguard.handoff.errors import HandoffError
from lcguard.handoff.policy import PolicyError
from lcguard.text.guard import TextGuard
from lcguard.text.placeholder import Placeholders
from tests.paths import ROOT
from tests.text.policies import KEY, TERMS, guard, leaks, policy

NAME, SSN = "Ada Long", "912-55-1029"


def hidden(value: Any, *secrets: str, **edge: Any) -> Any:
    return guard(**edge).json(value, [*secrets]).value


def mark(value: str, category: str = "", conversation: str = "", tenant: str = "") -> str:
    return Placeholders(KEY, tenant, conversation).of(value, category)


# -- own categories, in every spelling


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(
    "spelled",
    [
        str.upper,
        lambda t: t.replace(" ", "\n"),
        lambda t: t.replace(" ", "\u00a0"),
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: unicodedata.normalize("NFD", t.upper()).replace(" ", "\u00a0\n"),
    ],
)
def test_a_term_is_hidden_in_every_spelling(term: str, spelled: Any) -> None:
    text = f"Before it, {spelled(term)}, and behind."
    assert guard().text(text).value == f"Before it, {mark(term, 'project')}, and behind."


@pytest.mark.parametrize("spelled", ["PRJ-1234", "prj-1234", "PRJ\u20111234", "PR\nJ-12\n34"])
def test_a_pattern_is_hidden_in_every_spelling(spelled: str) -> None:
    text = f"See {spelled} today."
    assert guard().text(text).value == f"See {mark('PRJ-1234', 'project')} today."


def test_what_a_pattern_found_once_is_hidden_everywhere() -> None:
    found = guard().messages([{"role": "user", "content": "PRJ-1234"}, {"content": "prj 1234"}])
    assert found.value[1]["content"] == mark("PRJ-1234", "project")
    assert found.hidden == {"PROJECT": 2}


# -- places


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "%"},
        {"role": "developer", "content": "% today"},
        {"role": "user", "name": "%", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "%"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "%"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "%"}]},
        {"role": "assistant", "content": None, "refusal": "not %"},
        {"role": "assistant", "content": "", "reasoning": "it is %"},
        {"role": "assistant", "content": "", "reasoning_content": "it is %"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "%"}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": "%"}'}},
        {"role": "assistant", "tool_calls": [{"id": "%", "function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "%", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": '{"rows": [["%", 1]]}'},
        {"type": "function_call_output", "call_id": "c", "output": '{"%": true}'},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": {"%": []}}'},
        {"role": "user", "content": "hi", "notes": {"%": ["%"]}},
        {"role": "%", "content": "hi"},
    ],
    ids=json.dumps,
)
def test_every_place_of_a_message(message: Any) -> None:
    raw = json.dumps(message)
    made = guard().messages([json.loads(raw.replace("%", NAME))], [NAME]).value
    assert made == [json.loads(raw.replace("%", mark(NAME)))]


def test_instructions_and_tools_of_a_request() -> None:
    rest = {
        "instructions": f"You know {NAME}.",
        "tools": [{"type": "function", "function": {"parameters": {"properties": {NAME: {}}}}}],
    }
    (_, made) = guard().request([], rest, [NAME]).value
    assert not leaks(made, NAME)
    assert made["tools"][0]["function"]["parameters"] == {"properties": {mark(NAME): {}}}


def arguments(text: str, *secrets: str) -> str:
    call = {"function": {"name": "f", "arguments": text}}
    made = guard().messages([{"role": "assistant", "tool_calls": [call]}], [*secrets])
    return str(made.value[0]["tool_calls"][0]["function"]["arguments"])


def test_arguments_keep_every_other_character() -> None:
    text = '{ "b":1,"a" : "x\\u00fc \\"Ada\\u0020L\\u006fng\\"",\n "n": [1.50, 12345678901234567]}'
    made = arguments(text, NAME)
    assert made == text.replace("Ada\\u0020L\\u006fng", mark(NAME))
    assert json.loads(made)["a"] == f'xü "{mark(NAME)}"'


@pytest.mark.parametrize("number", ["912551029", "-912551029", "912551029.0", "9.12551029e8"])
def test_a_number_becomes_a_string_and_the_arguments_still_parse(number: str) -> None:
    made = arguments(f'{{"ssn": {number}, "n": [1, {number}]}}', SSN)
    placeholder = json.loads(made)["ssn"]
    assert json.loads(made) == {"ssn": placeholder, "n": [1, placeholder]}
    assert placeholder == mark(SSN)
    assert arguments(number, SSN) == json.dumps(placeholder)


@pytest.mark.parametrize("number", ["9.876543210987654e15", "9876543210987654.0"])
def test_a_long_number_in_any_form(number: str) -> None:
    made = arguments(f'{{"card": {number}}}', "9876 5432 1098 7654")
    assert json.loads(made) == {"card": mark("9876543210987654")}
    huge = '{"n": [1e400, 1e-400, -0.0, 12.5e1]}'
    assert arguments(huge, SSN) == huge


def test_json_within_json_within_json() -> None:
    inner = json.dumps({"ssn": 912551029, "who": NAME})
    text = json.dumps({"body": json.dumps({"again": inner})})
    made = arguments(text, NAME, SSN)
    read = json.loads(json.loads(json.loads(made)["body"])["again"])
    assert read == {"ssn": mark(SSN), "who": mark(NAME)}


@pytest.mark.parametrize("digits", ["912551029", "9.12551029e8"])
def test_a_number_of_pythons(digits: str) -> None:
    assert hidden({"ssn": json.loads(digits), "n": 7}, SSN) == {"ssn": mark(SSN), "n": 7}


def test_two_spellings_as_keys_are_both_kept() -> None:
    made = hidden({"Ada Long": 1, "ADA LONG": 2}, NAME)
    assert made == {mark(NAME): 1, f"{mark(NAME)} (2)": 2}


# -- split values


def test_a_value_over_several_parts_is_hidden_once() -> None:
    parts = ["It is A", "da", " Lo", "ng. PRJ-1", "234!"]
    content = [{"type": "text", "text": text} for text in parts]
    found = guard().messages([{"role": "user", "content": content}], [NAME])
    shown = [part["text"] for part in found.value[0]["content"]]
    expected = [f"It is {mark(NAME)}", "", "", f". {mark('PRJ-1234', 'project')}", "!"]
    assert shown == expected
    assert found.hidden == {"TEXT": 1, "PROJECT": 1}


def test_a_value_over_parts_of_one_message_is_found_but_not_over_two_messages() -> None:
    one = {"role": "assistant", "reasoning": "Ada", "content": "Long"}
    made = guard().messages([one], [NAME]).value
    assert not leaks(made, NAME)
    two = [{"role": "user", "content": "Ada"}, {"role": "user", "content": "Long"}]
    assert guard().messages(two, [NAME]).value == two


def test_numbers_that_follow_each_other_are_not_one() -> None:
    value = {"n": [912, 55, 1029], "x": ["4", "2"]}
    assert hidden(value, SSN, "42") == value


# -- placeholders


def test_a_value_has_one_placeholder_in_a_conversation_and_after_a_restart() -> None:
    texts = [guard("talk").text(spelled, [NAME]).value for spelled in (NAME, "ADA\nLONG")]
    assert texts[0] == texts[1] == mark(NAME, conversation="talk")
    code = (
        "from tests.text.policies import guard\n"
        f"print(guard('talk').text({NAME!r}, [{NAME!r}]).value)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == texts[0], done.stderr


def test_other_values_conversations_tenants_and_keys_have_others() -> None:
    made = [
        mark(NAME),
        mark("Ada Lung"),
        mark(NAME, conversation="talk"),
        mark(NAME, tenant="acme"),
        Placeholders(b"another" * 5, "", "").of(NAME),
        mark("p@ss--!!"),
        mark("pass"),
    ]
    assert len(set(made)) == len(made)
    many = {mark(f"{i:05}") for i in range(2000)}
    assert len(many) == 2000


def test_a_placeholder_is_no_value_at_the_next_hop_and_a_forged_one_is() -> None:
    made = guard("first").text(f"{NAME} has {SSN}", [NAME, SSN]).value
    tail = made.split("-")[1][:3]
    again = guard("second").text(f"{made} {tail}", [tail]).value
    assert again == f"{made} {mark(tail, conversation='second')}"
    for forged in (
        f"[TEXT-{'912551029'.ljust(24, '0')}]",
        made.split()[0].replace("TEXT", "ADA_LONG"),
        made.split()[0].replace("TEXT", "X_912551029"),
    ):
        assert not leaks(guard().text(forged, [NAME, SSN]).value, NAME), forged
        assert not leaks(guard().text(forged, [NAME, SSN]).value, SSN), forged


def test_named_values_keep_their_bounds_where_a_detector_finds_more() -> None:
    def detect(text: str, forbid: Any) -> list[tuple[int, int]]:
        at = text.find(NAME)
        return [(at, at + len(f"{NAME} of Kyoto"))] if at >= 0 else []

    made = TextGuard(
        policy(forbid=["person"], detect="presidio"), "intake", "billing", key=KEY, detect=detect
    ).text(f"I saw {NAME} of Kyoto there.", [NAME])
    assert made.value == f"I saw {mark(NAME)}{mark(' of Kyoto')} there."


# -- refusals


def refused(make: Any) -> str:
    with pytest.raises(HandoffError) as found:
        make()
    text = str(found.value)
    assert "\n" not in text
    return text


def test_a_category_that_nothing_vouches_for_needs_named_values() -> None:
    edge = guard(forbid=["person", "project"])
    assert "person in a text: name the values" in refused(lambda: edge.text("hello"))
    assert edge.text("hello", []).value == "hello"
    assert guard().text("Grey Fox").hidden == {"PROJECT": 1}


def test_kv_edges_take_no_text() -> None:
    found = refused(lambda: guard(channel="kv"))
    assert "intake -> billing takes KV alone, not text" in found
    closed = refused(lambda: TextGuard(policy(), "intake", "other", key=KEY))
    assert "intake -> other takes KV alone" in closed


def test_an_edge_with_a_detector_is_not_guarded_without_it() -> None:
    assert "detect: presidio" in refused(lambda: guard(detect="presidio"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"bytes", "a bytes is no JSON value"),
        ({1: "x"}, "a key is a int"),
        (float("nan"), "no JSON number"),
        ([[]] * 2 + [{"a": object()}], "object"),
    ],
)
def test_what_is_no_json_is_refused(value: Any, said: str) -> None:
    assert said in refused(lambda: guard().json(value))


def test_depth_is_bounded() -> None:
    value: Any = "x"
    for _ in range(100):
        value = [value]
    assert "deep" in refused(lambda: guard().json(value))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA"}},
        {"image_url": "https://example.com"},
    ],
)
def test_media_are_refused(part: Any) -> None:
    assert "media" in refused(lambda: guard().messages([{"role": "user", "content": [part]}]))


def test_a_secret_of_nothing_is_refused() -> None:
    assert "secrets[1]" in refused(lambda: guard().text("x", ["a", " \n"]))


def test_a_policys_path_will_do(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nedges:\n- {source: a, audience: b, channel: text, forbid: [person]}\n"
    )
    found = TextGuard(path, "a", "b", key=KEY, secrets=[NAME]).text(f"It is {NAME}.")
    assert found.value == f"It is {mark(NAME)}."
    with pytest.raises(PolicyError):
        TextGuard(path, "a*", "b", key=KEY)
