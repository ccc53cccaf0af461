"""deploy/grafana/lcguard.json asks for what the proxy's /metrics really has, and for all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lcguard.server.audit.trail import EVENTS
from tests.engine import needs_vllm
from tests.paths import ROOT
from tests.server.proxy import ASK_COMPLAINT, Front, error

pytest_plugins = ("tests.server.proxy_fixtures",)
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "lcguard.json").read_text())
SCRAPED = {"job"}
"""Labels that Prometheus adds itself."""
LEFT_OUT: dict[str, str] = {}
"""Metric -> why no panel shows it."""

Samples = dict[str, list[dict[str, str]]]
"""Name of a series, such as ``lcguard_requests_total`` -> the labels of each."""


def targets() -> Iterator[tuple[str, str, str]]:
    """Panel, expression, legend."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]


def problems(expr: str, legend: str, samples: Samples) -> list[str]:
    """What an expression asks for that is not there."""
    out = (
        [f"unbalanced: {expr}"]
        if any(expr.count(a) != expr.count(b) for a, b in "() {} []".split())
        else []
    )
    known = set(SCRAPED)
    for name, matchers in re.findall(r"(lcguard_\w+)(?:\{([^}]*)\})?", expr):
        if name not in samples:
            out.append(f"no metric {name}")
            continue
        labels = {label for found in samples[name] for label in found}
        known |= labels
        for label, value in re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', matchers):
            if label not in labels | SCRAPED:
                out.append(f"{name} has no label {label}")
            elif label not in SCRAPED:
                out += [
                    f"{name}: no {label} {one}"
                    for one in value.split("|")
                    if not may_be(label, one, samples[name])
                ]
    asked = [x.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for x in group.split(",")]
    shown = re.findall(r"\{\{(\w+)\}\}", legend)
    out += [f"no label {label}" for label in (*asked, *shown) if label not in known]
    if asked:
        out += [f"{label} is summed over" for label in shown if label not in asked]
    return out


def may_be(label: str, value: str, found: list[dict[str, str]]) -> bool:
    """Seen, or one of the values that the code gives."""
    if label == "event":
        return value in EVENTS
    if label == "code":
        sources = (path.read_text() for path in (ROOT / "server").rglob("*.py"))
        return any(f'"{value}"' in text for text in sources)
    return any(one.get(label) == value for one in found)


def test_panels_lie_side_by_side_and_have_a_text() -> None:
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
    assert max(x for x, _ in taken) == 23


@needs_vllm
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
class TestOnTheRealMetrics:
    @pytest.fixture(scope="class")
    def samples(self, tight: Front) -> Samples:
        """Of a proxy that has served, refused and closed edges, as an admin's key shows them."""
        intake, reader = tight.auth("intake"), tight.auth("open")
        handle = tight.handle(intake, "open")
        tight.answer(reader, ASK_COMPLAINT, handle)
        assert error(tight.ask(tight.auth("clerk"), ASK_COMPLAINT, handle))[0] in (403, 404)
        text = tight.http.get("/metrics", headers=tight.auth("root", role="admin")).text
        out: Samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                out.setdefault(sample.name, []).append(sample.labels)
        return out

    def test_every_expression_asks_for_what_is_there(self, samples: Samples) -> None:
        wrong = [(t, problems(expr, legend, samples)) for t, expr, legend in targets()]
        assert [found for found in wrong if found[1]] == []

    def test_every_metric_has_a_panel_or_a_reason(self, samples: Samples) -> None:
        asked = {name for _, expr, _ in targets() for name in re.findall(r"lcguard_\w+", expr)}
        there = {n for n in samples if not n.endswith(("_created", "_sum", "_count"))}
        assert there - asked == set(LEFT_OUT)
        assert all(LEFT_OUT.values())

    def test_another_name_would_be_found(self, samples: Samples) -> None:
        for expr, legend, said in (
            ("lcguard_handoff_total", "", "no metric lcguard_handoff_total"),
            ('lcguard_ready{chek="x"}', "", "lcguard_ready has no label chek"),
            ('lcguard_ready{check="stor"}', "", "lcguard_ready: no check stor"),
            ("sum by (codes) (lcguard_refused_total)", "", "no label codes"),
            ("sum by (code) (lcguard_refused_total)", "{{route}}", "no label route"),
            ("sum(lcguard_refused_total", "", "unbalanced"),
        ):
            assert any(said in found for found in problems(expr, legend, samples)), expr
