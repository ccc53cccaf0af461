"""Categories of a policy's own that a head finds: trained in seconds here, on made-up names."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lcguard
from lcguard.category_head import CARD, WEIGHTS, CategoryHead, HeadCard
from lcguard.cli import app
from lcguard.commands.category_detector import save_head
from lcguard.commands.live_servers import Site
from lcguard.commands.policy import warnings
from lcguard.commands.text_detector import TextDetector
from lcguard.custom_categories import CustomCategory, find_learned
from lcguard.detokenize import TokenTexts
from lcguard.handoff.keys import new_key
from lcguard.handoff.policy import Policy, PolicyError, load_policy, parse_policy
from lcguard.handoff.policy_reader import PolicyReader
from lcguard.handoff.policy_review import why
from lcguard.handoff.redaction import RedactionError, redact
from lcguard.strict_yaml import parse_yaml
from lcguard.text.stream import looks_anywhere
from lcguard.value_search import Spellings
from tests.docs.blocks import block
from tests.server.proxy import Front

NAME = "project_name"
FIRST = ("Amber", "Silent", "Copper", "Hollow", "Northern", "Velvet", "Iron", "Paper", "Quiet")
LAST = ("Falcon", "Harbor", "Lantern", "Orchard", "Willow", "Canyon", "Beacon", "Otter", "Meadow")
UNSEEN = ("Crimson Badger", "Lunar Thistle", "Frozen Compass", "Golden Raven", "Salt Glacier")
WITH = (
    "Project {} is over budget.",
    "The kickoff of project {} was moved to May.",
    "Nobody should hear about project {} yet.",
    "We need three engineers for project {} now.",
)
WITHOUT = (
    "The invoice from Acme Bank was paid.",
    "Maria is in Lisbon on Monday.",
    "Lunch is late.",
)
FEW = ("steps=60", "folds=2", "swaps=1")
FILE = "project_names.jsonl"


def line(text: str, *values: str, category: str = NAME) -> str:
    spans = [
        {"start": m.start(), "end": m.end(), "category": category}
        for v in values
        for m in [re.search(re.escape(v), text)]
        if m
    ]
    return json.dumps({"text": text, "spans": spans, "questions": []}) + "\n"


def examples(n: int, category: str = NAME) -> str:
    rng, out = random.Random(4), ""
    for i in range(n):
        value = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        text = f"{WITH[i % len(WITH)].format(value)} {rng.choice(WITHOUT)}"
        out += line(text, value, category=category)
        out += line(rng.choice(WITHOUT)) if i % 4 == 0 else ""
    return out


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["detect", "train", *words])


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as the documentation has it, its examples, and the head that the documented command
    made."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "policy.yaml").write_text(block("docs/proxy.md", "examples: project_names.jsonl"))
    (folder / FILE).write_text(examples(40))
    said = block("docs/proxy.md", "lcguard detect train --categories").split("#")[0].split()[3:]
    assert said == ["--categories", "policy.yaml"]
    done = run("--categories", str(folder / "policy.yaml"), *sets(*FEW))
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / "project_names.detector")
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """To be broken."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def card(folder: Path) -> HeadCard:
    return CategoryHead.read(folder / "project_names.detector").card


def altered(folder: Path, **changes: Any) -> None:
    """The head with another card."""
    where = folder / "project_names.detector"
    head = CategoryHead.read(where)
    save_head(CategoryHead(head.card.model_copy(update=changes), head.weights), where)


def texts(names: Sequence[str]) -> list[str]:
    return [f"{WITH[i % 4].format(name)} Lunch is late." for i, name in enumerate(names)]


# -- found


def test_names_in_no_list_are_hidden_on_a_text_edge(folder: Path) -> None:
    key = bytes.fromhex(new_key())
    guard = lcguard.text_guard(folder / "policy.yaml", "intake", "billing", key=key)
    assert looks_anywhere(guard)
    made = [guard.text(text) for text in texts(UNSEEN)]
    hidden = [m for m, name in zip(made, UNSEEN, strict=True) if name not in m.value]
    assert len(hidden) >= 4
    assert all(m.hidden.keys() == {"PROJECT_NAME"} for m in hidden)
    # what one place gave away is covered in all, in other spellings and beside other keys
    told = guard.json({"a": WITH[0].format(UNSEEN[0]), "b": UNSEEN[0].upper()}).value
    assert UNSEEN[0].upper() not in told["b"]
    assert guard.text("Lunch is late. Maria is in Lisbon.").value.startswith("Lunch is late.")


def test_the_same_on_edges_of_kv(folder: Path) -> None:
    """As the proxy and ``GuardedLLM`` look through a prompt's tokens."""
    tokenizer = lcguard.load_agent("nano").tokenizer
    custom = load_policy(folder / "policy.yaml").for_edge("intake", "desk").custom
    assert custom.keys() == {NAME}
    covered = 0
    for text, name in zip(texts(UNSEEN), UNSEEN, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt = TokenTexts(tokenizer).of(ids)
        spans = redact(prompt, ids, tokenizer, [], custom=custom).spans
        left = [i for i in range(len(ids)) if not any(a <= i < b for a, b in spans)]
        covered += name not in tokenizer.decode([ids[i] for i in left])
        assert len(left) > 3
    assert covered >= 4


def test_the_proxy_hides_them(folder: Path, tmp_path: Path) -> None:
    edge = {"source": "intake", "audience": "billing", "channel": "text", "forbid": [NAME]}
    own = {NAME: {"examples": str(folder / FILE)}}
    site = Site(tmp_path, {"version": 1, "categories": own, "edges": [edge]})
    site.key("nobody")
    nowhere = {"url": "http://127.0.0.1:9", "retries": 0}  # text needs no engine
    with site.proxy(None, ready=False, upstream=nowhere) as running:
        running.wait("/livez")
        with Front(site, running) as front:
            body = {"audience": "billing", "text": "\n".join(texts(UNSEEN))}
            said = front.http.post("/lcguard/v1/text", json=body, headers=front.auth("intake"))
            assert said.status_code == 200, said.text
            assert sum(name not in said.json()["text"] for name in UNSEEN) >= 4
            assert said.json()["applied"]["hidden"].keys() == {"PROJECT_NAME"}
            shown = front.http.get("/lcguard/v1/policy", headers=front.auth("intake")).text
            assert '"examples":50' in shown.replace(" ", "")


def test_detect_takes_heads_and_the_built_in_categories_are_as_before(folder: Path) -> None:
    head = folder / "project_names.detector"
    note, found = "The patient's name is Ada Long. SSN: 912-55-1029.", 0
    for name, text in zip(UNSEEN, texts(UNSEEN), strict=True):
        before = lcguard.detect(f"{text} {note}", ["government_id"])
        both = lcguard.detect(f"{text} {note}", ["government_id"], own=[head])
        assert [s for s in both if s.category == "government_id"] == before != []
        found += any(name in text[s.start : s.end] for s in both if s.category == NAME)
    assert found >= 3


def test_a_text_is_read_once_for_all_own_categories(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps what it finds, also where that is another's."""
    head = CategoryHead.read(folder / "project_names.detector")
    other = CategoryHead(head.card.model_copy(update={"category": "code_name"}), head.weights)
    own = {"terms_alone": CustomCategory(terms=("nothing",))}
    for one in (head, other):
        own[one.card.category] = CustomCategory.joined((own["terms_alone"],))
        own[one.card.category]._heads = (one,)
    read, pieces = list[str](), TextDetector._pieces
    monkeypatch.setattr(
        TextDetector, "_pieces", lambda self, text: (read.append(text), pieces(self, text))[1]
    )
    text = " ".join(texts(UNSEEN))
    found = find_learned(text, own)
    assert read == [text]
    assert found.keys() == {NAME, "code_name"}
    assert found[NAME] == found["code_name"] != []
    assert find_learned(text, {NAME: own[NAME]}) == {NAME: found[NAME]}


def test_what_was_measured_is_said(folder: Path, copy: Path) -> None:
    held = card(folder).held_out
    assert held.total == 40
    assert held.found / held.total == held.recall > held.recall_lower
    policy = load_policy(folder / "policy.yaml")
    said = "\n".join(why(policy, "intake", "billing"))
    assert f"a head trained on {card(folder).n_examples} examples" in said
    altered(copy, held_out=held.model_copy(update={"found": 30, "recall_lower": 0.6123}))
    (warned,) = warnings(load_policy(copy / "policy.yaml"), copy / "none.yaml")
    assert "found 30 of 40, at least 0.61 of them at 95%, less than min_recall 0.9" in warned
    path = copy / "policy.yaml"
    path.write_text(path.read_text().replace(f"{FILE}", f"{FILE}\n    min_recall: 0.61"))
    assert warnings(load_policy(path), copy / "none.yaml") == []


# -- bound to what it was made of


def test_another_head_is_another_definition(folder: Path, copy: Path) -> None:
    one = load_policy(folder / "policy.yaml")
    terms = {"version": 1, "categories": {NAME: {"terms": ["Blue Heron"]}}, "edges": []}
    assert parse_policy(terms).definitions["*"][NAME] != one.definitions["*"][NAME]
    # as many terms and patterns as before: what is kept of older definitions stays theirs
    reader = PolicyReader()
    reader(copy / "policy.yaml")
    altered(copy, threshold=card(copy).threshold + 1)
    other = load_policy(copy / "policy.yaml")
    assert other.definitions != one.definitions
    assert other.digest == one.digest
    path = copy / "policy.yaml"
    path.write_text(path.read_text().removesuffix("...\n"))
    with pytest.raises(PolicyError, match=r"project_name has .* another head"):
        reader(path)


def test_a_dumped_policy_is_the_same_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = load_policy(folder / "policy.yaml")
    monkeypatch.chdir(tmp_path)
    assert parse_policy(found.model_dump(mode="json")) == found


def refused(folder: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(folder / "policy.yaml")
    said = str(caught.value)
    assert "\n" not in said
    assert f"categories.{NAME}." in said
    return said


def test_examples_that_nobody_can_find_by_are_refused(copy: Path) -> None:
    head = copy / "project_names.detector"
    fix = f"run `lcguard detect train --name {NAME} --examples {copy / FILE} --out {head}`"
    altered(copy, category="ship_name")
    assert f"was trained for 'ship_name': {fix}" in refused(copy)
    altered(copy, category=NAME, base_sha256="0" * 64)
    assert f"another detector of text than this release has: {fix}" in refused(copy)
    shutil.rmtree(head)
    assert f"no head was trained in {head}: {fix}" in refused(copy)
    (copy / FILE).unlink()
    assert f"{copy / FILE} cannot be read: No such file" in refused(copy)


def test_other_examples_and_damaged_heads_are_refused(copy: Path) -> None:
    (copy / FILE).write_text(examples(41))
    assert f"was trained on other examples than {FILE} has now: run `lcguard" in refused(copy)
    (copy / FILE).write_text(examples(40))
    load_policy(copy / "policy.yaml")
    weights = copy / "project_names.detector" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert f"{weights} is not what its card says: it was altered or cut" in refused(copy)
    (copy / "project_names.detector" / CARD).write_text("{}")
    assert f"{CARD}: category: Field required" in refused(copy)


def test_a_head_can_stand_without_its_examples(copy: Path) -> None:
    (copy / FILE).unlink()
    path = copy / "policy.yaml"
    path.write_text(
        path.read_text().replace(f"examples: {FILE}", "detector: project_names.detector")
    )
    assert load_policy(path).for_edge("intake", "billing").custom[NAME].heads


def test_a_policy_without_its_heads_guards_nothing(folder: Path) -> None:
    data = parse_yaml((folder / "policy.yaml").read_text())
    open_ = parse_policy(data, folder=folder, untrained=True).for_edge("intake", "desk").custom
    text = WITH[0].format(UNSEEN[0])
    tokenizer = lcguard.load_agent("nano").tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(RedactionError, match=r"project_name\.examples: no head was"):
        redact(TokenTexts(tokenizer).of(ids), ids, tokenizer, [], custom=open_)
    with pytest.raises(ValueError, match="no head was read"):
        open_[NAME].find(Spellings(text))


# -- what cannot be trained


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (examples(12), "12 texts with 11 different values of 'project_name': give at least 20"),
        (line(WITH[0].format("Red Kite"), "Red Kite") * 30, "30 texts with 1 different values"),
        (examples(30, "projct_name"), "category 'projct_name' is unknown: did you mean 'project_n"),
        (examples(30, "person"), "0 texts with 0 different values"),
        ('{"text": "a"}\n', "x.jsonl:1: spans: missing"),
        ("", "no records"),
    ],
)
def test_too_little_to_learn_from_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    done = run("--name", NAME, "--examples", str(tmp_path / "x.jsonl"))
    assert isinstance(done.exception, ValueError)
    assert said in str(done.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_options_that_do_not_go_together(tmp_path: Path, folder: Path) -> None:
    path, file = str(folder / "policy.yaml"), str(folder / FILE)
    for words, said in (
        ([], "nothing to train: name a configuration, or --categories POLICY, or --name NAME"),
        (["text", "--name", NAME], "a configuration and --quick are not for categories of your"),
        (["--name", NAME], "give one --name and --examples FILE, or --categories POLICY"),
        (["--categories", path, "--examples", file], "--examples and --out stand in the policy"),
        (["--categories", path, "--name", "deal"], "'deal' is no category with examples"),
        (["--name", "health", "--examples", file], "'health' is a built-in category"),
        (
            ["--name", NAME, "--examples", file, "--out", str(folder)],
            "is there and no head's folder",
        ),
        (["--name", NAME, "--examples", file, "--set", "stps=1"], "stps"),
    ):
        done = run(*words)
        assert isinstance(done.exception, ValueError), words
        assert said in str(done.exception)


def test_a_policy_is_made_without_reading_the_model(folder: Path) -> None:
    found: Policy = load_policy(folder / "policy.yaml")
    assert found.for_edge("intake", "billing").reads_text
    assert not found.for_edge("a", "b").model_copy(update={"forbid": ()}).reads_text
