"""Two proxies before one engine, on one PostgreSQL: what one knows or forbids, the other does."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcguard.commands.live_servers import Running, Site
from lcguard.server.audit.verify import verify
from lcguard.server.database.place import PASSWORD_VARIABLE, place_of, reading
from lcguard.server.database.writer import Database
from lcguard.server.leakage.edge_state import EdgeLeakage, store_edge
from lcguard.server.limits.key_limits import Limits
from tests.engine import needs_vllm
from tests.server.option_cases import FOREVER, with_key
from tests.server.postgres import Server
from tests.server.proxy import ASK_SSN, SSN, Front, error, front_of, wait_for

pytest_plugins = ("tests.server.proxy_fixtures", "tests.server.databases")
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@dataclass
class Pair:
    """The proxies, each with a folder of its own and the same keys."""

    one: Front
    other: Front
    url: str
    key: bytes

    def rows(self, where: str = "TRUE", *values: Any) -> list[tuple[str, str, str]]:
        """Event, handle and request of the audit's rows, in order."""
        with reading(place_of(self.url, 5.0)) as connection:
            return list(
                connection.execute(
                    f"SELECT event, handle, request_id FROM audit WHERE {where} ORDER BY seq",
                    values,
                )
            )

    def whole(self) -> None:
        assert verify(self.url, self.key).problems == []


def opened(site: Site, engine: Running, folder: Path, url: str, **more: Any) -> Any:
    people = folder.parent / "people" / "keys.yaml"
    people.parent.mkdir(exist_ok=True)
    shared = with_key(site, PASSWORD_VARIABLE, os.environ[PASSWORD_VARIABLE])
    limits = {"max_output_tokens": FOREVER}
    return front_of(shared, engine, folder, keys=str(people), database=url, limits=limits, **more)


@pytest.fixture(scope="module")
def pair(
    site: Site, engine: Running, postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder, url = tmp_path_factory.mktemp("pair"), postgres.empty()
    with (
        opened(site, engine, folder / "one", url) as one,
        opened(site, engine, folder / "other", url) as other,
    ):
        other.keys = one.keys
        yield Pair(one, other, url, bytes.fromhex(site.environment["LCGUARD_KEY"]))


def both(pair: Pair, agent: str, **more: Any) -> dict[str, str]:
    """A key that both proxies have read."""
    return pair.other.accepted(pair.one.auth(agent, **more))


def revoke(front: Front, who: dict[str, str], handle: str, **query: Any) -> httpx.Response:
    return front.http.delete(f"/lcguard/v1/segments/{handle}", headers=who, params=query)


def test_what_one_publishes_the_other_delivers(pair: Pair) -> None:
    intake, clerk = both(pair, "intake"), both(pair, "clerk")
    handle = pair.one.handle(intake, "clerk")
    assert SSN in pair.other.answer(clerk, ASK_SSN, handle)
    assert SSN in pair.one.answer(clerk, ASK_SSN, pair.other.handle(intake, "clerk"))
    events = [event for event, *_ in pair.rows("handle = ?", handle)]
    assert events == ["publish", "published", "consume", "consumed"]
    pair.whole()


def test_a_revocation_holds_at_once_at_the_other(pair: Pair) -> None:
    intake, clerk, later = (both(pair, name) for name in ("intake", "clerk", "open"))
    first = pair.one.handle(intake, "clerk")
    on_top = pair.other.chat(
        clerk, "", {"consume": [first], "publish": {"audience": "open"}}, max_tokens=1
    )
    assert on_top.status_code == 200, on_top.text
    second = on_top.json()["lcguard"]["published"]["handle"]
    assert pair.other.ask(clerk, ASK_SSN, first).status_code == 200
    assert revoke(pair.one, intake, first, cascade=True).status_code == 200
    assert error(pair.other.ask(clerk, ASK_SSN, first)) == (404, "no_segment")
    assert error(pair.other.ask(later, ASK_SSN, second)) == (404, "no_segment")


def test_an_answer_on_its_way_ends_when_the_other_revokes(pair: Pair) -> None:
    intake, clerk = both(pair, "intake"), both(pair, "clerk")
    handle = pair.one.handle(intake, "clerk")
    body = {
        "model": "nano",
        "prompt": ASK_SSN,
        "max_tokens": FOREVER,
        "ignore_eos": True,
        "stream": True,
        "lcguard": {"consume": [handle]},
    }
    with pair.other.http.stream("POST", "/v1/completions", json=body, headers=clerk) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert revoke(pair.one, intake, handle).status_code == 200
        rest = list(lines)
    assert "data: [DONE]" not in rest
    assert any("was revoked" in line for line in rest), rest[-3:]
    wait_for(lambda: ("failed", handle) in [row[:2] for row in pair.rows("handle = ?", handle)])


def test_a_closed_edge_is_closed_at_both(pair: Pair) -> None:
    """Whoever ran the canaries."""
    intake, shut, root = both(pair, "intake"), both(pair, "shut"), both(pair, "root", role="admin")
    handle = pair.one.handle(intake, "shut")
    edge = EdgeLeakage("default", "intake", "shut", since_s=1.0, state="closed", reason="a test")
    with Database(pair.url) as database:
        database.write_now(lambda connection: store_edge(connection, edge))
    for front in (pair.one, pair.other):
        assert error(front.publish(intake, "shut")) == (403, "edge_closed")
        assert error(front.ask(shut, ASK_SSN, handle)) == (403, "edge_closed")
    name = {"tenant": "default", "source": "intake", "audience": "shut"}
    opened = pair.one.http.post("/lcguard/v1/leakage/reopen", json=name, headers=root)
    assert opened.status_code == 200
    assert SSN in pair.other.answer(shut, ASK_SSN, handle)
    page = pair.other.http.get("/dashboard", auth=("any", root["Authorization"].split()[1]))
    assert page.status_code == 200
    assert "shut" in page.text


def test_racing_requests_get_no_more_than_the_budget(pair: Pair) -> None:
    intake, measured = both(pair, "intake"), both(pair, "rationed")
    handles = [pair.one.handle(intake, "rationed", f"Note {i}.") for i in range(8)]

    def ask(i: int) -> int:
        front = (pair.one, pair.other)[i % 2]
        return front.ask(measured, "Which?", handles[i], max_tokens=1).status_code

    with ThreadPoolExecutor(8) as pool:
        found = Counter(pool.map(ask, range(8)))
    assert found == {200: 3, 403: 5}
    rows = pair.rows("audience = 'rationed' AND event = 'consumed'")
    assert len({handle for _, handle, _ in rows}) == 3
    pair.whole()


def test_a_keys_own_limits_are_counted_together(pair: Pair) -> None:
    hasty = pair.one.site.key("hasty", limits=Limits(requests_per_min=1))
    header = {"Authorization": f"Bearer {hasty}"}
    for front in (pair.one, pair.other):
        front.accepted(header)
    assert pair.one.complete(header, "a", max_tokens=1).status_code == 200
    refused = pair.other.complete(header, "a", max_tokens=1)
    assert error(refused) == (429, "limited")
    assert "1 requests a minute" in refused.text


def test_a_proxy_that_is_killed_loses_nothing_that_was_told(
    pair: Pair, site: Site, engine: Running, tmp_path: Path
) -> None:
    intake, clerk = both(pair, "intake"), both(pair, "clerk")
    with opened(site, engine, tmp_path / "third", pair.url) as third:
        told: list[str] = []

        def publish(i: int) -> None:
            front = third if i % 2 else pair.other
            try:
                answer = front.publish(intake, "clerk", f"Note {i}.")
            except httpx.HTTPError:
                return
            if answer.status_code == 200:
                told.append(answer.json()["lcguard"]["published"]["handle"])
            if len(told) == 4:
                os.kill(third.running.process.pid, signal.SIGKILL)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(publish, range(24)))
        third.running.process.wait()
    assert len(told) >= 12
    for handle in told:
        events = [event for event, *_ in pair.rows("handle = ?", handle)]
        assert events[:2] == ["publish", "published"], (handle, events)
    for front in (pair.one, pair.other):  # the next writes, and reads, as if nothing had been
        assert front.ask(clerk, "Which?", told[0], max_tokens=1).status_code == 200
    pair.whole()


def test_without_its_database_nobody_hands_over(pair: Pair, postgres: Server) -> None:
    intake, clerk = both(pair, "intake"), both(pair, "clerk")
    handle = pair.one.handle(intake, "clerk")
    postgres.stop()
    try:
        for front in (pair.one, pair.other):
            assert error(front.publish(intake, "clerk")) == (503, "unavailable")
            assert error(front.ask(clerk, ASK_SSN, handle)) == (503, "unavailable")
            assert os.environ[PASSWORD_VARIABLE] not in front.running.log.read_text()
    finally:
        postgres.start()
    for front in (pair.one, pair.other):
        wait_for(lambda front=front: front.ready()["ready"])
        assert SSN in front.answer(clerk, ASK_SSN, handle)
    pair.whole()
