"""The dashboard, as a browser shows it: readable, safe with hostile names, and live."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcguard.server.dashboard.graph_layout import arrange
from lcguard.server.dashboard.graph_svg import graph
from lcguard.server.dashboard.leak_svg import leak_bar, scale_top
from lcguard.server.dashboard.page import (
    Totals,
    headers,
    new_nonce,
    render,
)
from tests.server.dashboard.browsing import REFRESH_S, Open, Site
from tests.server.dashboard.views import (
    FORTY,
    FRESH,
    HARD,
    HOSTILE,
    THREE,
    VIEWS,
    closed,
    edge,
    unmeasured,
)

pytest.importorskip("jinja2", reason="the dashboard needs jinja2: pip install lcguard[server]")


pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install lcguard[server]")


# Without a browser.


@pytest.mark.parametrize("nonce", ["", "short", "a" * 21, "x" * 30 + "'; script-src *", "a" * 65])
def test_a_nonce_that_could_open_the_policy_is_refused(nonce: str) -> None:
    with pytest.raises(ValueError, match="nonce"):
        headers(nonce)
    with pytest.raises(ValueError, match="nonce"):
        render(FRESH, nonce)


def test_each_response_has_a_nonce_of_its_own() -> None:
    first, second = new_nonce(), new_nonce()
    assert first != second
    assert headers(first)["content-security-policy"].count(first) == 2


def test_deceiving_characters_show() -> None:
    page = render(HARD, new_nonce())
    assert "\u202e" not in page
    assert "\x07" not in page
    assert page.count("a�b�") >= 2  # the drawing and the table


def test_missing_figures_are_said_and_never_zero() -> None:
    page = render(replace(FRESH, edges=(unmeasured("a", "b"),)), new_nonce())
    assert page.count("not measured yet") >= 4  # leak, publish, both latencies
    assert "0.0%" not in page.split("<main")[1].split("threshold")[0]


def test_an_open_edge_is_never_called_closed() -> None:
    page = render(replace(THREE, edges=(edge("a", "b"),)), new_nonce())
    assert "CLOSED" not in page
    assert "edge is closed" not in page
    assert "CLOSED" in render(THREE, new_nonce())


def test_only_a_small_graph_is_drawn() -> None:
    assert not graph(THREE.edges, ()).too_large
    forty = graph(FORTY.edges, ())
    assert forty.too_large
    assert forty.wide is not None
    assert forty.wide.count("✕ CLOSED") == 2  # what is drawn of it
    assert graph([e for e in FORTY.edges if e.state == "open"], ()).wide is None
    assert graph([edge("*", "*")], ()).wide is None


def test_all_bars_share_a_scale_that_shows_every_figure() -> None:
    assert scale_top([], 0.1) == 0.2
    assert scale_top(THREE.edges, 0.1) == 0.4
    assert scale_top([edge("a", "b", asr=1.0, asr_high=1.0)], 0.1) == 1.0
    assert 'class="bar above"' in leak_bar(closed("a", "b"), 0.1, 0.4)
    assert 'class="bar below"' in leak_bar(edge("a", "b"), 0.1, 0.4)
    assert leak_bar(unmeasured("a", "b"), 0.1, 0.4) == ""


_PAIR = st.tuples(st.sampled_from("abcdefg"), st.sampled_from("abcdefg"))
PAIRS = st.lists(_PAIR.filter(lambda pair: pair[0] != pair[1]), max_size=14)


@given(PAIRS)
def test_layout_keeps_every_edge(pairs: list[tuple[str, str]]) -> None:
    edges = [((a,), (b,)) for a, b in pairs]
    layout = arrange(edges)
    layer_of = {node: k for k, layer in enumerate(layout.layers) for node in layer}
    assert len(layer_of) == sum(map(len, layout.layers))  # each once
    assert layer_of.keys() - layout.stops == {node for e in edges for node in e}
    for (source, target), path in zip(edges, layout.paths, strict=True):
        assert (path[0], path[-1]) == (source, target)
        steps = {layer_of[b] - layer_of[a] for a, b in pairwise(path)}
        assert steps in ({1}, {-1})  # one layer at a time, in one direction


def test_layout_follows_the_hops_and_turns_only_what_closes_a_cycle() -> None:
    chain = [(("a",), ("b",)), (("b",), ("c",)), (("c",), ("a",))]
    assert [layer[0] for layer in arrange(chain).layers] == [("a",), ("b",), ("c",)]
    with pytest.raises(ValueError, match="loop"):
        arrange([(("a",), ("a",))])


def until(page: Any, condition: str) -> None:
    """Playwright's own waiting evaluates text, which the page's policy forbids."""
    deadline = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


FITS = "document.scrollingElement.scrollWidth <= document.scrollingElement.clientWidth"


# Text whose colour is less than 4.5 to 1 away from what lies behind it (WCAG AA).
FAINT = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a] = parse(getComputedStyle(e).backgroundColor);
      if (a === undefined || a > 0) return [r, g, b];
    }
  };
  const faint = [];
  for (const element of document.querySelectorAll("main *:not(svg *)")) {
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const pair = [parse(getComputedStyle(element).color).slice(0, 3), behind(element)].map(light);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (!(ratio >= 4.5)) faint.push([element.textContent, ratio]);
  }
  return faint;
}"""


@pytest.mark.parametrize("name", VIEWS)
def test_reads_well_on_desk_and_phone(name: str, site: Site, visit: Open) -> None:
    site.view = VIEWS[name]
    for width, scheme in product((1280, 800, 390), ("light", "dark")):
        page = visit(viewport={"width": width, "height": 844}, color_scheme=scheme)
        assert page.evaluate(FITS), (width, scheme)
        assert page.evaluate(FAINT) == [], (width, scheme)
        rows = page.locator("table.edges tbody tr")
        assert rows.count() == len(site.view.edges)
        for i, row in enumerate(sorted(site.view.edges, key=lambda e: (e.state, e.source))):
            if i < 4:  # the rest differs in the name only
                assert rows.nth(i).locator("th .edge").is_visible()
                box = rows.nth(i).locator("th .edge").bounding_box()
                assert 0 <= box["x"] < box["x"] + box["width"] <= width
                assert ("✕ CLOSED" in rows.nth(i).inner_text()) == (row.state == "closed")
        text = page.inner_text("main")
        for row in site.view.edges:
            for who in (row.source, row.audience):
                assert who.isprintable() is False or who == "*" or who in text
        scheme_paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (scheme_paper == "rgb(21, 23, 26)") == (scheme == "dark")
        page.context.close()


def test_a_fresh_start_says_what_to_do(site: Site, visit: Open) -> None:
    text = visit().inner_text("main")
    assert "No agent has called yet" in text
    assert "Give each agent a key." in text
    assert "a command" in text


def test_alarms_are_words_at_the_top(site: Site, visit: Open) -> None:
    site.view = replace(HARD, edges=(closed("intake", "triage"), edge("intake", "billing")))
    page = visit(viewport={"width": 1280, "height": 900})
    assert page.title().startswith("1 closed")
    alerts = page.locator("#alerts")
    assert alerts.bounding_box()["y"] < 200
    text = " ".join(alerts.inner_text().split())
    assert "1 edge is closed" in text
    assert "publishers are refused" in text
    assert "12 of 64 planted secrets" in text
    assert "connection refused" in text
    assert "'helth' is no category" in text
    assert page.locator(".graph:visible .tag.closed").text_content() == "✕ CLOSED"


def test_drawing_and_tables_have_names_for_a_screen_reader(site: Site, visit: Open) -> None:
    site.view = THREE
    page = visit()
    drawing = page.get_by_role("img", name="Agents and hops")
    assert drawing.count() == 1
    assert "intake to triage: closed" in drawing.locator("desc").text_content()
    for name in ("Edges", "Agents", "Audit"):
        table = page.get_by_role("region", name=name, exact=True).get_by_role("table").last
        assert table.get_by_role("columnheader").count() >= 5
        assert table.get_by_role("rowheader").count() >= 1
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.nodeName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_names_stay_text(site: Site, visit: Open) -> None:
    site.view = HARD
    page = visit()
    page.wait_for_timeout(3 * REFRESH_S * 1000)  # and after patching
    assert page.locator("main img").count() == 0
    assert page.locator("main script").count() == 0
    assert page.locator("table.agents th", has_text="<script>alert(1)</script>").is_visible()
    assert page.locator("table.edges th", has_text=HOSTILE).first.is_visible()


def test_the_browser_runs_nothing_but_the_pages_own(site: Site, visit: Open) -> None:
    page = visit(expect_problems=True)
    stopped = page.evaluate("""async () => {
      const stopped = new Set();
      document.addEventListener(
        "securitypolicyviolation", (e) => stopped.add(e.effectiveDirective));
      const add = (name, set) => document.body.append(Object.assign(
        document.createElement(name), set));
      add("script", { textContent: "window.ran = 1" });
      add("style", { textContent: "body { display: none }" });
      add("img", { src: "/x.png" });
      add("iframe", { src: "/dashboard" });
      await fetch("http://127.0.0.1:9/").catch(() => 0);
      await new Promise((done) => setTimeout(done, 300));
      return [window.ran, [...stopped].sort(), getComputedStyle(document.body).display];
    }""")
    ran, directives, display = stopped
    assert ran is None
    assert display == "block"
    assert directives == [
        "connect-src",
        "frame-src",
        "img-src",
        "script-src-elem",
        "style-src-elem",
    ]


def test_refresh_keeps_place_focus_and_elements(site: Site, visit: Open) -> None:
    site.view = FORTY
    page = visit(viewport={"width": 1280, "height": 800})
    page.evaluate("""() => {
      document.querySelector("table.edges").closest(".scroll").focus({ preventScroll: true });
      scrollTo(0, 3000);
      document.querySelector("table.edges tr:last-child").mark = true;
    }""")
    changed = (*FORTY.agents[1:], replace(FORTY.agents[0], requests=987_654))
    site.view = replace(FORTY, agents=changed, totals=Totals(555_555))
    until(page, "document.querySelector('main').textContent.includes('555,555')")
    assert page.locator("table.agents").get_by_text("987,654").count() == 1
    assert page.evaluate("scrollY") == 3000
    assert page.evaluate("document.activeElement.className") == "scroll"
    assert page.evaluate("document.querySelector('table.edges tr:last-child').mark") is True


def test_refresh_grows_from_nothing_to_a_closed_edge_and_back(site: Site, visit: Open) -> None:
    page = visit()
    site.view = THREE
    page.get_by_text("1 edge is closed").wait_for()
    until(page, "document.title.startsWith('1 closed')")
    assert page.locator(".graph:visible").count() == 1
    # the patched page is the one that a reload gives
    now, loaded = "document.querySelector('main').outerHTML", page.context.new_page()
    loaded.goto(site.url)
    assert page.evaluate(now) == loaded.evaluate(now)
    site.view = replace(THREE, edges=(edge("intake", "billing"),))
    page.get_by_text("1 edge is closed").wait_for(state="detached")
    until(page, "document.title === 'LCGuard'")


def test_a_new_version_loads_the_page_anew(site: Site, visit: Open) -> None:
    page = visit()
    page.evaluate("window.old = true")
    with page.expect_event("load"):
        site.view = replace(FRESH, version="0.2.0")
    assert page.evaluate("window.old === undefined")
    page.get_by_text("version 0.2.0").wait_for()


def test_connection_lost_is_said_and_taken_back(site: Site, visit: Open) -> None:
    site.view = THREE
    page = visit(expect_problems=True)  # the browser logs the failed requests itself
    notice = page.get_by_role("status")
    assert notice.count() == 0
    site.stop()
    page.get_by_text("Connection lost: the server does not answer").wait_for()
    assert "20:26:40 UTC" in notice.inner_text()  # how old the figures are
    assert page.get_by_text("intake").first.is_visible()  # the last ones stay
    site.start()
    notice.wait_for(state="hidden")
    site.status = 503
    page.get_by_text("Connection lost: the server answers with status 503").wait_for()
    site.status = 403
    page.get_by_text("refuses this page (status 403)").wait_for()


def test_without_scripts_the_page_reloads_itself(site: Site, visit: Open) -> None:
    page = visit(java_script_enabled=False)
    site.view = THREE
    page.get_by_text("1 edge is closed").wait_for()


@pytest.mark.parametrize("in_address", [False, True])
def test_refresh_keeps_the_key(in_address: bool, site: Site, visit: Open) -> None:
    site.key = b"me:a-key"
    if in_address:
        page = visit(expect_problems=True, at="me:a-key@")
    else:
        page = visit(True, http_credentials={"username": "me", "password": "a-key"})
    site.view = THREE
    page.get_by_text("1 edge is closed").wait_for()
    site.key = b"me:another"  # revoked
    page.get_by_text("the server refuses this page (status 401)").wait_for()
