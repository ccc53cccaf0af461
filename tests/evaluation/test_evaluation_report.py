"""The report: figures from the dict alone, text escaped, nothing hidden, nothing fetched."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcguard.evaluation.charts import charts
from lcguard.evaluation.main_table import main_table
from lcguard.evaluation.report import to_html, to_markdown, write_report
from lcguard.evaluation.results import Report, report_schema
from lcguard.evaluation.tables import overview
from lcguard.evaluation.verdict import figure, percent
from tests.paths import ROOT

EVIL = "<script>alert(1)</script>\"' onload=x ![i](https://x.example/a) |\u202e\ud800"


class Page(HTMLParser):
    """Tags and ids of a page; fails on an unbalanced one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "use"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def row(guard: str, share: float, train: float | None, fresh: float) -> dict[str, Any]:
    category = {
        "asr": fresh,
        "wilson": [0.0, 0.9],
        "bootstrap": [0.01, 0.8],
        "floor": 0.03,
        "ceiling": 0.83,
        "n": 120,
    }
    return {
        "guard": guard,
        "utility": 0.9 * share,
        "utility_vanilla": 0.9,
        "utility_relative": share,
        "asr_train": train,
        "asr_fresh": fresh,
        "asr_fresh_ci": [fresh - 0.01, fresh + 0.01],
        "asr_fresh_by_attack": {
            "decoder": fresh,
            "probe": {
                "asr": 0.012,
                "ci": [0.0, 0.0371],
                "token_accuracy": 0.117,
                "ce_gap_nats": 1.23,
            },
        },
        "asr_injection": 0.019,
        "floor": 0.03,
        "ceiling": 0.83,
        "advantage": fresh - 0.03,
        "likelihood": {
            "100": {
                "asr": fresh,
                "ci": [fresh - 0.011, fresh + 0.013],
                "floor": 0.0123,
                "blind": 0.0234,
                "rank_median": 47.0,
                "nats": 0.345,
                "n": 140,
                "shorter": 0.0456,
            },
            "length_nats": 1.12,
        },
        "any_of_k": 0.0823,
        "asr_by_category": {"salary": category, "iban": {"asr": None}},
        "counts": {"success": 31, "resisted": 689, "error": 0, "not_applicable": 12},
        "latency_ms": {"prefill": 31.2, "guard": 1.84},
        "bytes_share": 0.713,
        "certificate": {
            "mean_nats": 0.41,
            "upper_nats": 0.52,
            "p99_nats": 2.1,
            "max_nats": 4.4,
            "entropy_nats": 6.9,
            "asr_ceiling": 0.222,
            "vacuous": True,
            "n_pairs": 512,
        },
        "note": "a note",
    }


def full() -> dict[str, Any]:
    return {
        "title": "A run",
        "created": "2030-01-01T00:00:00Z",
        "command": "lcguard eval run x.yaml",
        "git": {"revision": "abc123", "dirty": False},
        "seeds": [0, 1, 2],
        "hardware": {"cpu": "c", "gpu": None},
        "packages": {"numpy": "2"},
        "model": {"name": "nano"},
        "data": {"records": 240},
        "results": [
            row("identity", 1.0, None, 0.83),
            row("residual", 0.99, 0.04, 0.61),
            row("gate", 0.981, 0.03, 0.047),
            row("mute", 0.3, 0.03, 0.03),
        ],
        "policies": [
            {
                "policy": "billing",
                "forbidden": ["diagnosis"],
                "utility": 0.911,
                "utility_vanilla": 0.922,
                "allowed_accuracy": 0.955,
                "allowed_accuracy_vanilla": 0.966,
                "asr_forbidden": 0.041,
                "asr_forbidden_ci": [0.02, 0.06],
                "floor": 0.033,
                "counts": None,
            }
        ],
        "derived": [
            {
                "guard": "gate",
                "policy": "billing",
                "question": "band?",
                "source_category": "salary",
                "accuracy": 0.931,
                "accuracy_vanilla": 0.972,
                "asr_exact": 0.021,
                "asr_exact_best_guess": 0.052,
            }
        ],
        "length_channel": {"redact": 0.094, "redact_fixed_length": None, "floor": 0.03},
        "explained": [
            {
                "title": "Summary",
                "guard": "gate",
                "policy": "billing",
                "tokens": [
                    {"text": "Patient", "withheld": 0.02, "category": None},
                    {"text": " Maria", "withheld": 0.97, "category": "person_name"},
                    {"text": " ok\n", "withheld": None},
                ],
            }
        ],
        "notes": ["one note"],
        "extra_key": "kept",
    }


@pytest.fixture(scope="module")
def html() -> str:
    return to_html(full())


@pytest.fixture
def no_html(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcguard.evaluation.report.to_html", lambda _: "")


def test_numbers_print_as_measured() -> None:
    assert percent(0.0456) == "4.6%"
    assert percent(np.float64(0.5)) == "50.0%"
    assert figure(1.84, "ms") == "1.84 ms"
    assert figure(31234.0) == "31,234"
    for absent in (None, float("nan"), float("inf"), "x", True, []):
        assert percent(absent) == figure(absent) == "not measured"


def test_write_report_writes_three_forms(tmp_path: Path, html: str) -> None:
    report = full()
    paths = write_report(report, tmp_path / "deep" / "out")
    assert sorted(p.name for p in paths["json"].parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads(paths["json"].read_text()) == report
    assert paths["html"].read_text() == html  # equal reports, equal bytes


def test_write_report_keeps_the_old_file_when_it_fails(tmp_path: Path, no_html: None) -> None:
    paths = write_report(full(), tmp_path)
    before = paths["json"].read_bytes()
    with pytest.raises(ValueError, match="not JSON"):
        write_report(full() | {"extra_key": object()}, tmp_path)
    assert paths["json"].read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_not_finite_becomes_null(tmp_path: Path, no_html: None) -> None:
    report = full()
    report["results"][0]["asr_fresh"] = float("nan")
    report["results"][1]["floor"] = np.float32("inf")
    found = json.loads(write_report(report, tmp_path)["json"].read_text())["results"]
    assert found[0]["asr_fresh"] is None
    assert found[1]["floor"] is None


def test_every_figure_stands_in_both_texts(html: str) -> None:
    for text in (to_markdown(full()), html):
        plain = re.sub(r"<[^>]*>", " ", text).replace("\\", "")
        for shown in (
            "98.1%",
            "4.7%",
            "3.7%",
            "5.7%",
            "83.0%",
            "8.2%",
            "1.9%",
            "31",
            "689",
            "12",
            "11.7%",
            "1.23 nats",
            "1.2%",
            "31.2 ms",
            "1.84 ms",
            "71.3%",
            "0.410",
            "0.520",
            "22.2%",
            "512",
            "91.1%",
            "92.2%",
            "95.5%",
            "96.6%",
            "4.1%",
            "93.1%",
            "97.2%",
            "2.1%",
            "5.2%",
            "9.4%",
            "0.345 nats",
            "47.0",
            "1.12 nats",
            "2.3%",
            "4.6%",
            "abc123",
            "a note",
            "one note",
            "kept",
            "vacuous",
            "0, 1, 2",
            "not measured",
        ):
            assert shown in plain, shown


def test_opening_table_is_the_first_thing() -> None:
    text = to_markdown(full())
    assert text.index("At a glance") < text.index("| identity |") < text.index("## Attackers")
    assert "Rule: protects = " in text.replace("\\", "")
    words = [r[-1].partition(":")[0] for r in overview(full()).rows]
    assert words == ["leaks", "leaks", "protects", "useless"]


@pytest.mark.parametrize(
    "report",
    [{}, {"results": []}, {"results": [{"guard": "gate"}]}, {"results": None, "explained": None}],
)
def test_missing_figures_are_named_not_hidden(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(report, tmp_path)
    for kind in ("md", "html"):
        assert paths[kind].read_text().lower().count("not measured") >= 8
    Page(paths["html"].read_text())


def test_html_is_self_contained_and_accessible(html: str) -> None:
    text, page = html, Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "image"}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    tables = [t for t, _ in page.tags if t == "table"]
    assert len(tables) == text.count("<caption>") > 5
    assert all("scope" in a for t, a in page.tags if t == "th")
    pictures = [a for t, a in page.tags if t == "svg"]
    assert len(pictures) == 6
    assert all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    assert ("html", {"lang": "en"}) in page.tags
    assert "prefers-color-scheme:dark" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    report = full()
    report["title"] = EVIL
    report["notes"] = [EVIL]
    report["results"][0] |= {"guard": EVIL, "note": EVIL}
    report["results"][1]["asr_by_category"] = {EVIL: {"asr": 0.1}, "$x_y$": {"asr": 0.2}}
    report["results"][1]["asr_fresh_by_attack"] = {EVIL: 0.2}
    report["explained"][0]["tokens"] = [
        {"text": EVIL, "withheld": w, "category": EVIL} for w in (0.1, 0.9, None)
    ]
    paths = write_report(report, tmp_path)
    html, markdown = (paths[k].read_text(encoding="utf-8") for k in ("html", "md"))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if any(k.startswith("on") for k in a)]
    assert any("<script>alert(1)</script>" in w for w in page.words)
    assert "\u202e" not in html + markdown
    assert "<script" not in markdown
    assert "![" not in markdown
    assert "https://" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "alert" in line]
    assert rows
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    assert set(cells) <= {6, 7, 9, 11}


def test_explained_context_reads_without_colour(html: str) -> None:
    text = html
    assert 'title="97% withheld, person_name"> Maria</span>' in text
    assert '<span class="t hid" style="--w:0.97"' in text
    assert '<span class="t unknown" title="not measured"> ok↵\n</span>' in text
    assert "<li>Maria (person_name): 97% withheld on average</li>" in text
    assert "Patient<del> Maria</del> ok" in to_markdown(full())


def test_charts_are_text_and_follow_the_theme() -> None:
    found = charts(full())
    assert len(found) == 3
    for chart in found:
        for svg in (chart.wide, chart.narrow):
            assert svg is not None
            assert ">gate</text>" in svg
            assert "var(--protects)" in svg
            assert "<metadata" not in svg
            assert not re.search(r"#0a7561|@font-face|<image", svg)
    assert [c.wide for c in charts({"results": [{"guard": "x"}]})] == [None] * 3


def test_without_matplotlib_results_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install lcguard\[eval\]"):
        write_report(full(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.mark.parametrize("name", ["demo", "multihop", "smollm2-agentleak"])
def test_committed_results_are_reports(name: str) -> None:
    """Nothing of them is lost or unknown, and both kinds can be shown."""
    given = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    report = Report.of(given)
    assert report.plain() == given
    assert not report.model_extra
    assert not any(row.model_extra for row in report.results)
    assert report.over_graphs is (name == "multihop")
    assert main_table(report).rows
    assert report.title is not None
    assert report.title.split(":")[0] in to_markdown(report).replace("\\", "")


def test_the_schema_names_what_readers_of_a_report_rely_on() -> None:
    schema = report_schema()
    row = schema["$defs"]["GuardRow"]["properties"]
    wanted = {"guard", "utility", "utility_vanilla", "asr_fresh", "asr_fresh_by_attack", "floor"}
    assert wanted | {"ceiling", "asr_graph"} <= set(row)
    assert schema["properties"]["schema_version"]["default"] == 1
    assert all("null" in json.dumps(row[name]) for name in ("asr_fresh", "floor", "utility"))
