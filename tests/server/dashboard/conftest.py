"""Fixtures of the dashboard's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.dashboard.browsing import Open, Site, _ours


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (dev extra)")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(names)}")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Open]:
    """Opens the page; the test fails if the page complained or asked another host."""
    contexts: list[Any] = []
    problems: list[str] = []

    def open_page(expect_problems: bool = False, at: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        if not expect_problems:
            page.on("console", lambda m: problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda r: problems.append(r.url) if not _ours(r.url, site) else None)
        page.goto(site.url.replace("//", f"//{at}"))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
